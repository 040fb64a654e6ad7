"""Index arithmetic only: grid.py numbers patches; multiblock.py, inverse_block.py and hidden.py draw some of them;
packing.py lays lists of indices end to end.
"""
