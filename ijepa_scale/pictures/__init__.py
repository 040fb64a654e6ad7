"""A checkpoint -> pictures of what it has learned.

subject.py opens the checkpoint and images that it was not trained on; drawing.py has a function for each picture, and
sketches.py those of what launch/train_sketch.py has trained. What these compute and draw is in visualize/, as functions
of arrays. Beside NAME.png there is NAME.json: its title, caption and alternative text, by which a page shows it. Of
several checkpoints each has NAME-checkpoint-STEP.png. Those that training itself draws are run/step_pictures.py's.
"""
