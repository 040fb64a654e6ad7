"""Initial weights, by name and seed."""

import hashlib

import torch
from torch import nn


def initial_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """One parameter's initial value, fp32 on the CPU: a function of its name, shape and the seed alone.

    So it is the same at every ZeRO stage and world size, and no rank needs the whole model. Matrices and the mask
    token: normal with std 0.02, cut at +-2 (the reference's, which re-applies it over its depth-dependent rescaling);
    biases 0; norm weights 1.
    """
    if len(shape) <= 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator)
