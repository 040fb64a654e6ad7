"""Recipes of pre-training beside one another: a CompareConfig -> runs -> probes -> curves -> table, plot, results.json.

comparison.py goes through it top to bottom. recipes.py reads the recipes and refuses what would not be a fair
comparison; runs.py says which runs there are and how long each is, pacing.py how long they take; launching.py trains
one, in processes of its own; probing.py scores its checkpoints; curves.py has the arithmetic, and results.py what is
written and shown.
"""
