"""What a kernel does, by its name; and in which phase of a step it was launched, by a trace."""

import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from ijepa_scale.plan.step_model import ATTENTION, COPIES, ELEMENTWISE, MATRIX, REDUCTIONS, TAIL

COMMUNICATION, OTHER = "communication", "other"
FORWARD, BACKWARD, AFTER = "forward", "backward", "after the backward"
EVALUATE = "autograd::engine::evaluate_function: "  # what the profiler puts before the name of a node of the backward

# The first that fits a name in lower case. torch.compile's kernels come first: their names list operations of any kind.
RULES = [
    (MATRIX, r"triton_tem|triton_mm"),
    (REDUCTIONS, r"triton_(red|per)_"),
    (ELEMENTWISE, r"triton_poi_"),
    (COMMUNICATION, r"nccl|allreduce|allgather"),
    (ATTENTION, r"flash|fmha|sdpa|attention|attn"),
    (TAIL, r"adamw?(?![a-z])|multi_tensor_apply|(^|_)ema_kernel|fusedadam"),
    (MATRIX, r"gemm|gemv|nvjet|cutlass|xmma|splitk|matmul|linear_gelu|aten::(add|b|badd)?mm|linear"),
    (
        REDUCTIONS,
        r"layer_?norm|gammabeta|rowwisemoments|softmax|reduce|norm|target_loss|column_sums|context_grad|mask_grad"
        r"|aten::(sum|mean)",
    ),
    (COPIES, r"memcpy|memset|copy|fill|catarray|aten::(cat|stack|zero)"),
    (
        ELEMENTWISE,
        r"elementwise|index|gather|scatter|gelu|patchify|assemble|_scale_kernel|arange"
        r"|aten::(add|mul|sub|div|addc|lerp|erf|pow|sqrt)",
    ),
]


def category_of(name: str) -> str:
    """The category of a CUDA kernel, a copy or, on a CPU, an operation of PyTorch's."""
    lower = name.lower()
    return next((category for category, pattern in RULES if re.search(pattern, lower)), OTHER)


def category_in(phase: str, name: str) -> str:
    """The same of something launched in a phase: what follows the backward is the optimizer's and the EMA's."""
    category = category_of(name)
    return TAIL if phase == AFTER and category != COMMUNICATION else category


class Phases:
    """In which phase of its step something was launched, by where the host then was."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        """events: a trace's, of phase X."""
        self._launches: dict[Any, float] = {}
        self._backward: list[tuple[float, float]] = []
        self._accumulating: list[tuple[float, float]] = []
        self._bounds: dict[tuple[float, float], tuple[float, float] | None] = {}
        for event in events:
            category, start = event.get("cat"), event["ts"]
            if category in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
                self._launches[event["args"]["correlation"]] = start
            elif category == "cpu_op" and event["name"].startswith(EVALUATE):
                self._backward.append((start, start + event["dur"]))
                if "AccumulateGrad" in event["name"]:
                    self._accumulating.append(self._backward[-1])
        self._accumulating.sort()

    def of(self, event: dict[str, Any], step: tuple[float, float]) -> str:
        """FORWARD, BACKWARD or AFTER; "" where it is not known when it was launched. step: its start and end."""
        launched = event["ts"]
        if event.get("cat") != "cpu_op":
            launched = self._launches.get(event.get("args", {}).get("correlation"))
        bounds = self._backward_of(step)
        if launched is None or bounds is None:
            return ""
        if launched < bounds[0]:
            return FORWARD
        if launched > bounds[1] or self._accumulates(launched):
            return AFTER  # the hooks that take gradients over, as they come, are a part of what follows
        return BACKWARD

    def _backward_of(self, step: tuple[float, float]) -> tuple[float, float] | None:
        """From its first operation to the end of its last."""
        if step not in self._bounds:
            inside = [one for one in self._backward if step[0] <= one[0] < step[1]]
            self._bounds[step] = (min(inside)[0], max(end for _, end in inside)) if inside else None
        return self._bounds[step]

    def _accumulates(self, moment: float) -> bool:
        at = bisect_right(self._accumulating, (moment, float("inf"))) - 1
        return at >= 0 and moment <= self._accumulating[at][1]
