"""Buckets of parameters at ZeRO-1 and -2: which lie and travel together, and which part of them a rank owns."""

from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 128  # elements that each rank's part of a bucket is a multiple of: NCCL then copies 16 bytes at once


class Bucket:
    """Parameters of one group whose weights lie end to end and whose gradients travel together.

    weights: flat, padded, in the parameters' dtype; own: this rank's part of it. master: fp32, this rank's part (own
    itself where weights are fp32); with offload it and the average lie in the host's memory. gradients: flat like
    weights while they are collected. gradient: this rank's part of the sum over ranks and micro-steps, in fp32 or as it
    travelled.
    """

    def __init__(
        self,
        group: dict[str, Any],
        parameters: list[torch.nn.Parameter],
        rank: int,
        ranks: int,
        *,
        offload: bool = False,
    ):
        self.group, self.parameters, self.offload = group, parameters, offload
        self.offsets = [0]
        for parameter in parameters:
            self.offsets.append(self.offsets[-1] + parameter.numel())
        self.used = self.offsets[-1]
        self.share = share_of(self.used, ranks)
        first = parameters[0]
        self.weights = torch.zeros(self.share * ranks, dtype=first.dtype, device=first.device)
        for parameter, offset in zip(parameters, self.offsets, strict=False):
            view = self.weights.narrow(0, offset, parameter.numel()).view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
        self.own = self.weights.narrow(0, rank * self.share, self.share)
        if offload:
            self.master = self.own.to("cpu", torch.float32, copy=True)
        else:
            self.master = self.own if first.dtype == torch.float32 else self.own.float()
        self.ema: torch.Tensor | None = None  # fp32, this rank's part of the masters' average
        self.target: torch.Tensor | None = None  # flat, like weights, of the averaged network
        self.target_own: torch.Tensor | None = None  # this rank's part of it (the EMA itself where weights are fp32)
        self.rank = rank
        self.gradients: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None
        self.held: set[int] = set()  # parameters whose gradient of this or an earlier micro-step is in gradients
        self.awaited = set(range(len(parameters)))
        self.arriving: Any = None  # other ranks' parts of the weights, to be waited for before these are read

    def average(self, averages: list[torch.nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep an average of the masters, which these parameters become views of: (this rank's EMA, all weights)."""
        self.target = torch.zeros_like(self.weights, dtype=averages[0].dtype)
        for parameter, offset in zip(averages, self.offsets, strict=False):
            parameter.data = self.target.narrow(0, offset, parameter.numel()).view(parameter.shape)
        self.target_own = self.target.narrow(0, self.rank * self.share, self.share)
        alone = self.target.dtype == torch.float32 and not self.offload
        self.ema = self.target_own if alone else torch.empty_like(self.master, requires_grad=False)
        return self.ema, self.target

    def add(self, index: int, gradient: torch.Tensor, dtype: torch.dtype) -> None:
        """Take a parameter's gradient in; the first of a step is copied, so that nothing needs to be zeroed."""
        if self.gradients is None:
            self.gradients = torch.empty(self.weights.numel(), dtype=dtype, device=self.weights.device)
            self.gradients[self.used :] = 0
        offset, numel = self.offsets[index], self.parameters[index].numel()
        place = self.gradients.narrow(0, offset, numel).view(self.parameters[index].shape)
        if index in self.held:
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self.held.add(index)
        self.awaited.discard(index)

    def complete(self, dtype: torch.dtype) -> None:
        """Parameters that the backward did not reach have a gradient of 0."""
        for index in sorted(self.awaited):
            if index not in self.held:
                self.add(index, torch.zeros_like(self.parameters[index]), dtype)
        self.awaited.clear()

    def release(self) -> None:
        self.gradients = None
        self.held.clear()


def buckets_of(
    groups: list[dict[str, Any]], size: int, rank: int, ranks: int, *, offload: bool = False
) -> list[Bucket]:
    """Each group's parameters in order, cut into buckets of `size` elements or of one larger parameter."""
    return [
        Bucket(group, group["params"][first:last], rank, ranks, offload=offload)
        for group in groups
        for first, last in runs([parameter.numel() for parameter in group["params"]], size)
    ]


def runs(numels: Sequence[int], size: int) -> list[tuple[int, int]]:
    """(first, past the last) of runs of at most `size` elements, or of one that is larger alone."""
    found, first, held = [], 0, 0
    for at, numel in enumerate(numels):
        if at > first and held + numel > size:
            found.append((first, at))
            first, held = at, 0
        held += numel
    return [*found, (first, len(numels))] if first < len(numels) else found


def share_of(used: int, ranks: int) -> int:
    """Elements that each rank has of a bucket of so many, padding included."""
    return -(-used // (ALIGNMENT * ranks)) * ALIGNMENT
