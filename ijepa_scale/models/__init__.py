"""Networks: vit.py, the encoder; predictor.py, the narrow ViT behind it; blocks.py, what both are made of.

positions.py: where patches are. attention.py attends over packed tokens, by one of attention_backends.py, tested by
attention_self_test.py before use. initial.py draws weights by name and seed.
"""
