"""Index arithmetic only: grid.py numbers patches, multiblock.py draws blocks of them, packing.py lays lists of indices
end to end.
"""
