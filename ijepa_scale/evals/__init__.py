"""An encoder and labelled images -> features and scores. Everything here is handed encoders and image sets.

evaluation.py says what a task is handed and answers; tasks.py lists them, labels.py says which images have which class.
extract.py turns images into features, once for all, which stores.py and features.py keep. knn.py, logistic.py,
linear.py, lowshot.py and clevr.py score features; batches.py and training.py train classifiers for finetune.py and
attentive.py. probes.py scores before and after training, embed.py keeps features in a folder and looks into it.
"""
