"""Whether the Triton kernels run or the definitions, and how a kernel is launched.

Tensors on CUDA go to the kernels, others to the definitions. IJEPA_KERNELS=off: all go to the definitions; on: none
does. TRITON_INTERPRET=1: CPU tensors go to the kernels too, which Triton's interpreter runs. IJEPA_KERNELS_CHECK=1:
indices are looked at first, which waits for the device. All are read once, at import.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it is for Linux alone
    triton = tl = None

F = TypeVar("F", bound=Callable[..., Any])
MODES = ("auto", "on", "off")

_mode = os.environ.get("IJEPA_KERNELS") or "auto"
CHECK = os.environ.get("IJEPA_KERNELS_CHECK") == "1"
_interpreted = triton is not None and bool(triton.knobs.runtime.interpret)
_recorded: list[tuple[Any, tuple, dict[str, Any]]] | None = None

if _mode not in MODES:
    raise ValueError(f"IJEPA_KERNELS={_mode!r} in the environment; wants one of {', '.join(MODES)}")


def jit(function: F) -> F:
    """triton.jit, where there is Triton. Counts of rows are named T or R: no kernel is compiled for their values.

    Triton compiles one for integers that 16 divides, and one for others: a step whose count is the first such would
    take a second longer than the next (seen on an H100).
    """
    if triton is None:
        return function
    names = [name for name in inspect.signature(function).parameters if name in ("T", "R")]
    return triton.jit(function, do_not_specialize=names)


def use_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels run on this tensor."""
    if _mode == "off":
        return False
    if _interpreted or _recorded is not None:
        return True
    if _mode == "on" and not tensor.is_cuda:
        raise ValueError(f"IJEPA_KERNELS=on in the environment, but a tensor is on {tensor.device}; unset it")
    if _mode == "on" and triton is None:
        raise ValueError("IJEPA_KERNELS=on in the environment, but there is no Triton; install triton or unset it")
    return tensor.is_cuda and triton is not None


def chosen(device: torch.device) -> str:
    """What runs on a device, and why, in words."""
    kernels = use_kernels(torch.empty(0, device=device))
    why = f"tensors are on {device.type}"
    if _mode != "auto":
        why = f"IJEPA_KERNELS={_mode}"
    elif _interpreted:
        why = "TRITON_INTERPRET=1"
    return f"{'Triton kernels' if kernels else 'PyTorch definitions'} ({why})"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), in a form that torch.compile understands; not at all for an empty grid."""
    if _recorded is not None:
        _recorded.append((kernel, arguments, options))
    elif 0 in grid:
        return
    elif _interpreted:
        kernel[grid](*arguments, **options)
    else:
        # Triton launches on the current device, which need not be the tensors'. Without CUDA, fakes are traced.
        with torch.cuda.device_of(arguments[0]) if torch.cuda.is_initialized() else nullcontext():
            torch.library.wrap_triton(kernel)[grid](*arguments, **options)


def launch_tiles(kernel: Any, count: int, width: int, *arguments: Any, **options: Any) -> None:
    """launch() with a program for each BLOCK_ROWS x BLOCK_COLUMNS of count rows of a width."""
    rows, columns = tile(width)
    grid = (blocks(count, rows), blocks(width, columns))
    launch(kernel, grid, *arguments, **options, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)


@contextmanager
def recording() -> Iterator[list[tuple[Any, tuple, dict[str, Any]]]]:
    """(kernel, arguments, options) of all launches within, none of which takes place: results are not to be used."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


# Checks are plain ifs: a message that is put together before it is needed makes torch.compile fix the token count.


def check_tokens(**tensors: torch.Tensor) -> None:
    """That matrices are (rows, width), of one width, floating type and device."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be (rows, width), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, got {tensor.dtype}")
        if tensor.shape[1] != first.shape[1]:
            raise ValueError(f"{name} must be as wide as {first_name}, {first.shape[1]}, got {tensor.shape[1]}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device}, got {tensor.device}")


def check_written(**tensors: torch.Tensor | None) -> None:
    """That what a kernel writes to in place is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, as the kernel writes to it in place")


def check_indices(device: torch.device, *, ndim: int = 1, low: int = 0, **indices: tuple[torch.Tensor, int]) -> None:
    """That indices are int32 or int64, of so many dimensions and on the device.

    indices: name -> (tensor, number of rows that they may name). With IJEPA_KERNELS_CHECK=1 also that they lie in
    low..rows - 1.
    """
    for name, (tensor, rows) in indices.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimension(s), got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
        if CHECK and tensor.numel():
            wrong = ((tensor < low) | (tensor > rows - 1)).nonzero()  # rows may be 2**31, which int32 does not hold
            if len(wrong):
                place = wrong[0].tolist()
                raise ValueError(f"{name} must lie in {low}..{rows - 1}, got {tensor[tuple(place)].item()} at {place}")


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) that one program moves: columns waste little of the last part of a row."""
    columns = max((2**k for k in range(4, 11)), key=lambda size: (width / (-(-width // size) * size) > 0.9, size))
    columns = min(columns, 1 << max(4, (width - 1).bit_length()))
    return max(1, 4096 // columns), columns


def blocks(count: int, size: int) -> int:
    return -(-count // size)
