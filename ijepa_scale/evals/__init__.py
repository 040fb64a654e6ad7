"""Frozen encoders -> scores. Everything here is handed encoders and image sets, opened by others.

extract.py turns images into features, once for all; knn.py and logistic.py score features, probes.py those of several
labels before and after training, scores.py shows them. embed.py keeps features in a folder and looks into it.
"""
