"""Index arithmetic only: grid.py numbers patches, multiblock.py and inverse_block.py draw blocks of them, packing.py
lays lists of indices end to end.
"""
