"""Arrays -> pictures: masks, curves (losses and scores), comparison, neighbours. None reads a run or a model."""
