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
AT_ONCE = 1 << 25  # values of matrices of one shape that a GPU makes orthogonal at once, lest it wait for launches
SIZE = 0.2  # root mean square of an update's elements, about AdamW's: both go by one learning rate and weight decay


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T: all of its singular values near 1, in the matrix's dtype.

    matrix: (rows, columns), or (n, rows, columns) of n matrices; fp32, fp64 or, as on a GPU, bf16. A matrix of zeros
    stays one.
    """
    a, b, c = COEFFICIENTS
    sides, product = (-2, -1), torch.addmm if matrix.ndim == 2 else torch.baddbmm
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(sides, keepdim=True).clamp_(min=tiny)  # so that no square of a small gradient is lost
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=1)  # which no singular value exceeds
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update(matrix: torch.Tensor) -> torch.Tensor:
    """The step of a matrix, or of n matrices, from the momentum, before the learning rate."""
    precision = torch.bfloat16 if matrix.is_cuda else torch.float32
    return orthogonal(matrix.to(precision)).float().mul_(SIZE * math.sqrt(max(matrix.shape[-2:])))


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

    place: of the first value, counted from `first`. Matrices outside of these elements are not computed. On a GPU those
    of one shape are computed together, AT_ONCE values; on a CPU one by one, whatever its neighbours are.
    """
    owned: dict[torch.Size, list[int]] = {}
    offset = 0
    for shape in shapes:
        if offset < first + count and first < offset + shape.numel():
            owned.setdefault(shape, []).append(offset)
        offset += shape.numel()
    for shape, offsets in owned.items():
        size = shape.numel()
        together = max(1, AT_ONCE // size) if whole.is_cuda else 1
        for some in (offsets[i : i + together] for i in range(0, len(offsets), together)):
            matrices = [whole[offset : offset + size].view(shape) for offset in some]
            updates = update(matrices[0] if together == 1 else torch.stack(matrices)).reshape(len(some), size)
            for offset, values in zip(some, updates, strict=True):
                start, stop = max(offset, first), min(offset + size, first + count)
                yield start - first, values[start - offset : stop - offset]


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
        # on the device that weights are on, whatever the state's
        own = direction(flat.grad, state["exp_avg"], 1.0).to(self.parameters_of[flat][0].ds_tensor.device)
        parts_RL = gathered(own, own.dtype).view(dist.get_world_size(), -1)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        offset = 0
        for parameter in self.parameters_of[flat]:
            share, shape = parameter.partition_numel(), parameter.ds_shape
            whole = parts_RL[:, offset : offset + share].flatten()[: shape.numel()].view(shape)
            first = dist.get_rank() * share
            values = update(whole).flatten()[first : first + share]
            flat[offset : offset + values.numel()].sub_(values.to(flat.device), alpha=group["lr"])
            offset += share
