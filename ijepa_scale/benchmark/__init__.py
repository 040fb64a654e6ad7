"""What is timed, always beside a peer and a physical limit of the same device.

step.py times the training step beside dense_baseline.py and matrix products, in turns; data.py images to crops beside
torchvision and bare decoding. check.py runs the parts of parts.py, each in a process of its own: device.py, alone.py
(the step as in_memory.py sets it up), matmuls.py, attention.py, suites.py (pytest's). timing.py takes turns and says
which machine it was; profiling.py traces steps, categories.py sorts kernels; tables.py prints. Results are JSON.
"""
