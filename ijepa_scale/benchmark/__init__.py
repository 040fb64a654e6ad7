"""What is timed, always beside a peer and a physical limit from the same process.

step.py times the training step beside dense_baseline.py and matrix products; data.py times images to crops beside
torchvision and bare decoding. timing.py takes turns and says which machine it was; profiling.py traces a step;
tables.py prints. Results go to docs/measurements/<device>/ as JSON.
"""
