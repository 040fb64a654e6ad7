"""Arrays -> pictures: masks.py, curves.py (losses and scores), neighbours.py. Nothing here reads a run or a model."""
