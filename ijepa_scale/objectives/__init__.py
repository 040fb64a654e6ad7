"""What is learned from a batch. objective.py: what every objective answers, and all that other rooms know of one.

ijepa.py is the method: its networks, whose forward gives the loss, and IJepaObjective, which draws its masks
(masks.py), builds it, says what is trained and averaged, and counts its FLOPs (flops.py). regularization.py: terms
against collapse. data2vec.py is another; encoder_pair.py is what the two answer alike. mae.py and cae.py are built
likewise, of what pixels.py has for objectives that predict pixels.
"""
