"""What the server that forks the ranks of tests/processes.py imports beforehand: seconds, spent once.

Also what DeepSpeed and Pillow import where they are first used, which each rank would pay for anew.
"""

import gc

import datasets  # noqa: F401
import deepspeed
import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.pyplot  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
from PIL import Image

import ijepa_scale.engine.sharded_adamw
import ijepa_scale.evaluate
import ijepa_scale.train
import ijepa_scale.verbs.pretrain  # noqa: F401

Image.init()
# Each rank collects garbage before its loop: it would look through all of this, and so make a copy of its memory.
gc.collect()
gc.freeze()
