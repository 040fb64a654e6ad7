"""Attention kernels at the heads and ragged lengths of training, each layout of masks for the first time and again."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_scale import build
from ijepa_scale.benchmark.device import importable
from ijepa_scale.benchmark.timing import Say, machine, moment
from ijepa_scale.config import PretrainConfig
from ijepa_scale.masking.packing import Masks, Packed
from ijepa_scale.models.attention import Attend, Sequences, packed_attention
from ijepa_scale.models.attention_backends import BACKENDS
from ijepa_scale.models.attention_self_test import self_test

LAYOUTS, WARM_UP = 8, 2  # of masks; the first ones compile
REPEATS = 10  # in a row, of what is timed again
PREDICTOR_HEADS = (24, 32, 64)  # widths: the paper's at ViT-H, and those that kernels pad less


def kernels_here(device: torch.device) -> dict[str, Attend]:
    """What attends over packed tokens and runs on the device, by its name in the config."""
    found: dict[str, Attend] = {"sdpa": DENSE["sdpa"]}
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        for name, backend in BACKENDS.items():
            if backend.oldest <= major <= backend.newest and importable(name) == "yes":
                found[name] = backend.load()
    return found


def self_tests(config: PretrainConfig, device: torch.device) -> dict[str, str]:
    """Of each kernel here at each width of heads, in bf16: "right", or what is wrong. On a CPU of PyTorch's own."""
    kernels, longest = kernels_here(device), build.build_ijepa(config).grid.num_patches
    found = {}
    for name in [one for one in kernels if one != "sdpa"] or ["sdpa"]:
        for shape in head_shapes(config):
            try:
                self_test(name, kernels[name], {shape}, longest=longest, device=device, dtype=torch.bfloat16)
                said = "right"
            except ValueError as error:  # which is the answer
                said = str(error)
            found[f"{name}, head width {shape[1]}"] = said
    return found


def head_shapes(config: PretrainConfig) -> list[tuple[int, int]]:
    """(heads, width): the encoder's, then the predictor's of each width that divides its own."""
    size, narrow = build.vit_size(config.model), config.predictor.width
    widths = [width for width in PREDICTOR_HEADS if narrow % width == 0]
    return [(size.heads, size.width // size.heads), *((narrow // width, width) for width in widths)]


def dtype_of(config: PretrainConfig, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if build.training_precision(config, device) == "bf16" else torch.float32


def time_attention(config: PretrainConfig, device: torch.device, *, say: Say) -> dict[str, Any]:
    """Forward, and forward with backward, of each kernel: milliseconds a layer and TFLOP/s, without padding."""
    objective = build.build_ijepa(config)
    batch = config.optimization.micro_batch_size or config.optimization.global_batch_size
    masks = [objective.draw_masks(step, range(batch)).to(device) for step in range(LAYOUTS)]
    (heads, width), *narrow = head_shapes(config)
    cases = [("context", heads, width, [one.context for one in masks])]
    cases += [("predictor", *shape, [one.prediction for one in masks]) for shape in narrow]
    rows = []
    for name, attend in kernels_here(device).items():
        for network, many, wide, layouts in cases:
            say(f"{name}: {network}, head width {wide}")
            rows.append(
                {"kernel": name, "network": network, "heads": many, "head_width": wide}
                | timed([sequences_of(one, attend) for one in layouts], (many, wide), device, dtype_of(config, device))
            )
    whole = whole_images(masks[0], device)
    for name, call in dense_calls(device).items():
        say(f"{name}: target")
        rows.append(
            {"kernel": name, "network": "target", "heads": heads, "head_width": width}
            | timed([whole] * LAYOUTS, (heads, width), device, dtype_of(config, device), call=call, backward=False)
        )
    return {"machine": machine(device), "batch": batch, "rows": rows}


def sequences_of(packed: Packed, attend: Attend) -> tuple[Sequences, int]:
    """(the sequences, the sum of their squared lengths)."""
    return Sequences(packed.cu_seqlens, packed.max_seqlen, packed.num_tokens, attend), packed.num_pairs


def whole_images(masks: Masks, device: torch.device) -> tuple[Sequences, int]:
    count, length = masks.num_images, masks.num_patches
    bounds = torch.arange(count + 1, device=device, dtype=torch.int32) * length
    return Sequences(bounds, length, count * length), count * length**2


def dense_calls(device: torch.device) -> dict[str, Attend]:
    """Ways to attend within whole images."""
    if device.type != "cuda":
        return {"sdpa": DENSE["sdpa"]}
    return {**DENSE, **({"triton": BACKENDS["triton"].load()} if importable("triton") == "yes" else {})}


def _by_sdpa(backends: list[SDPBackend], qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    with sdpa_kernel(backends):
        return packed_attention(qkv_T3HE, replace(sequences, attend=None))


# Of PyTorch's own: what a run leaves on (engine/distributed.py), and what it could.
AS_IN_A_RUN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DENSE: dict[str, Attend] = {
    "sdpa": partial(_by_sdpa, AS_IN_A_RUN),
    "sdpa, cuDNN": partial(_by_sdpa, [SDPBackend.CUDNN_ATTENTION]),
}


def timed(
    layouts: Sequence[tuple[Sequences, int]],
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    call: Attend = packed_attention,
    backward: bool = True,
) -> dict[str, Any]:
    """Medians over layouts, after the first WARM_UP. first_ms: when a layout comes for the first time."""
    heads, width = shape
    found: dict[str, Any] = {}
    for what in ("forward", "forward and backward")[: 1 + backward]:
        first, again, rates = [], [], []
        for index, (sequences, pairs) in enumerate(layouts):
            qkv = torch.randn(sequences.num_tokens, 3, heads, width, device=device, dtype=dtype)
            run = _run(call, qkv, sequences, backward=what != "forward")
            once, twice = _milliseconds(run, device, 1), _milliseconds(run, device, REPEATS)
            if index >= WARM_UP:
                first.append(once)
                again.append(twice)
                flops = 4 * heads * width * pairs * (3 if what != "forward" else 1)
                rates.append(1e-9 * flops / twice)
        found[what] = {
            "milliseconds": statistics.median(again),
            "first_milliseconds": statistics.median(first),
            "tflop_per_second": statistics.median(rates),
        }
    return found


def _run(call: Attend, qkv: torch.Tensor, sequences: Sequences, *, backward: bool) -> Callable[[], Any]:
    if not backward:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return call(qkv, sequences)

        return forward
    leaf = qkv.requires_grad_()
    upstream = torch.randn_like(qkv[:, 0])
    return lambda: torch.autograd.grad(call(leaf, sequences), leaf, upstream)


def _milliseconds(run: Callable[[], Any], device: torch.device, times: int) -> float:
    start = moment(device)
    for _ in range(times):
        run()
    return 1e3 * (moment(device) - start) / times
