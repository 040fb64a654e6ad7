"""The memory-bound operations of the I-JEPA step, one file an operation, each with its plain-PyTorch definition."""
