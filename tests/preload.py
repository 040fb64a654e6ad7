"""What the server that forks the ranks of tests/processes.py imports beforehand: seconds, spent once."""

import datasets  # noqa: F401
import deepspeed
import deepspeed.module_inject
import deepspeed.runtime.zero.stage3  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401

import ijepa_scale.evaluate
import ijepa_scale.train  # noqa: F401
