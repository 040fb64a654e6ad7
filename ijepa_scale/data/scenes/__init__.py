"""Rendered scenes with exact labels: the data of configs/tiny.yaml, and a test bed whose answers are known.

Three to ten spheres, boxes, cylinders and cones on a ground plane, in the spirit of CLEVR (arXiv:1612.06890).
layout.py draws what a scene shows from a seed and an index, raycast.py turns that into pixels, and prepare.py writes
both, with the labels, to Parquet files in the cache, which are then a source like any other.
"""
