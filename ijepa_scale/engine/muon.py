"""Muon: the step of a matrix is its momentum, made orthogonal (arXiv:2502.16982; Keller Jordan's, of 2024).

A rank keeps its part of the momentum alone, as of AdamW's moments. A matrix is made orthogonal as a whole, so the ranks
give each other their parts of the update, and each computes the matrices of which it owns some.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's quintic, steepest at 0: singular values of 0.7 to 1.2
SIZE = 0.2  # root mean square of an update's elements, about AdamW's: both go by one learning rate and weight decay


def orthogonal(matrix_RC: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T: all of its singular values near 1, in the matrix's dtype.

    matrix_RC: (rows, columns), fp32, fp64 or, as on a GPU, bf16. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if tall else matrix_RC
    x = x / x.abs().amax().clamp_(min=torch.finfo(x.dtype).tiny)  # so that no square of a small gradient is lost
    x = x / torch.linalg.matrix_norm(x).clamp_(min=1)  # which no singular value exceeds
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def update(matrix_RC: torch.Tensor) -> torch.Tensor:
    """The step of a matrix, from its momentum, before the learning rate."""
    precision = torch.bfloat16 if matrix_RC.is_cuda else torch.float32
    return orthogonal(matrix_RC.to(precision)).float().mul_(SIZE * math.sqrt(max(matrix_RC.shape)))


def direction(gradient: torch.Tensor, momentum: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """What is to be made orthogonal, Nesterov's, fp32; momentum, fp32, takes the gradient in."""
    gradient = gradient.float() * scale
    momentum.lerp_(gradient, 1 - MOMENTUM)
    return gradient.lerp_(momentum, MOMENTUM)


def gathered(own: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All ranks' parts of a flat tensor, one after another, sent in dtype."""
    if (ranks := dist.get_world_size()) == 1:
        return own
    whole = torch.empty(own.numel() * ranks, dtype=dtype, device=own.device)
    dist.all_gather_into_tensor(whole, own.to(dtype))
    return whole


def own_updates(
    whole: torch.Tensor, shapes: list[torch.Size], first: int, count: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, values) of the updates of matrices that lie end to end, of elements first to first + count of them all.

    place: of the first value, counted from `first`. Matrices outside of these elements are not computed.
    """
    offset = 0
    for shape in shapes:
        start, stop = max(offset, first), min(offset + shape.numel(), first + count)
        if start < stop:
            values = update(whole[offset : offset + shape.numel()].view(shape)).flatten()
            yield start - first, values[start - offset : stop - offset]
        offset += shape.numel()


class MuonAndAdamW(torch.optim.AdamW):
    """Muon for the groups that say so (optim.py), AdamW for others; fp32.

    At ZeRO-1 and -2 only its groups and state are used, by sharded_adamw.py. At ZeRO-3 DeepSpeed hands step() one flat
    of a rank's parts of some parameters at a time, with its gradient. All ranks then compute all matrices.
    """

    def bind(self, flats: list[torch.Tensor], parameters: list[list[Any]]) -> None:
        """flats: of one rank's parts, and the parameters of each, as ZeRO-3 has cut them."""
        self.parameters_of = dict(zip(flats, parameters, strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        matrices = [(group, flat) for group in self.param_groups if group.get("muon") for flat in group["params"]]
        for group, flat in matrices:
            group["params"] = [other for other in group["params"] if other is not flat]
        super().step()
        for group, flat in matrices:
            group["params"].append(flat)
            self._update(group, flat, self.state[flat])

    def _update(self, group: dict[str, Any], flat: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        assert flat.grad is not None, "DeepSpeed steps what has a gradient"
        if not state:
            zeros = {kind: torch.zeros_like(flat) for kind in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.zeros((), device=flat.device), **zeros)
        state["step"] += 1
        own = direction(flat.grad, state["exp_avg"], 1.0)
        parts_RL = gathered(own, own.dtype).view(dist.get_world_size(), -1)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        offset = 0
        for parameter in self.parameters_of[flat]:
            share, shape = parameter.partition_numel(), parameter.ds_shape
            whole = parts_RL[:, offset : offset + share].flatten()[: shape.numel()].view(shape)
            first = dist.get_rank() * share
            values = update(whole).flatten()[first : first + share]
            flat[offset : offset + values.numel()].sub_(values, alpha=group["lr"])
            offset += share
