"""What a config amounts to before anything is trained: sizes, tokens, FLOPs, memory, hours. No GPU is needed.

checks.py refuses what contradicts itself, the same for a run and for --dry-run; dry_run.py says the rest in words.
A recipe on a cluster: sampling.py draws masks; memory.py, partitioned.py and collectives.py count what lies on a GPU
and what is sent; step_model.py and times.py say how long a step takes on what clusters.py knows; settings.py does so
for every setting; table.py and sweep.py put it in words.
"""
