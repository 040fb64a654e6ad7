"""Weights in and out. load.py takes whatever is given to it and asks the reader of its format for one network:
run.py reads runs of our own, reference.py files of the public reference.
"""
