"""Weights in and out. load.py finds what a path holds and gives one network of it; export.py writes networks.

A format a file: run.py (runs of our own), reference.py (the public release), transformers.py, timm.py, files.py (bare
weights), safetensors.py (exports of ours), onnx.py (written alone). weights.py: tensors -> networks of the sizes that
they show. networks.py: what is found, and what is loaded. record.py and card.py: what an export says of itself, to
programs and to people.
"""
