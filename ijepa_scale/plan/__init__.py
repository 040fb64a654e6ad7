"""What a config amounts to before anything is trained: sizes, tokens, FLOPs, memory, steps. No GPU is needed.

checks.py refuses what contradicts itself, the same for a run and for --dry-run; step_model.py estimates a step's time
by arithmetic; dry_run.py says the rest in words.
"""
