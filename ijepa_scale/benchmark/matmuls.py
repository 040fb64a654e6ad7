"""Matrix products at the exact shapes of a step, forward and both gradients, against the sustained rate."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from ijepa_scale import build
from ijepa_scale.benchmark.timing import Say, machine, moment
from ijepa_scale.config import PretrainConfig
from ijepa_scale.models.vit import pixel_columns
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.plan.step_model import (
    FORWARD,
    INPUT_GRADIENT,
    PATCHES_SHARE,
    SHARES,
    Product,
    Rates,
    products,
)

WARM_UP, SECONDS = 3, 0.03  # of timing a product


def time_products(config: PretrainConfig, device: torch.device, *, rates: Rates | None, say: Say) -> dict[str, Any]:
    """Each product of a step of one micro-batch, as autograd calls it: milliseconds, TFLOP/s, share of the sustained.

    rates: of this device as measured; None: not known.
    """
    objective = build.build_ijepa(config)
    batch = config.optimization.micro_batch_size or config.optimization.global_batch_size
    counts = Counts.of(objective.draw_masks(0, range(batch)))
    dtype = torch.bfloat16 if build.training_precision(config, device) == "bf16" else torch.float32
    listed = products(objective, counts)
    say(f"{len(listed)} products of {batch} images")
    rows = []
    for product in listed:
        seconds = seconds_of(as_computed(product, config.model.patch_size, device, dtype), device, dtype)
        rate = product.flops / product.count / seconds
        rows.append(
            {
                **{key: getattr(product, key) for key in ("network", "layer", "kind", "rows", "k", "n", "count")},
                "milliseconds": 1e3 * seconds,
                "tflop_per_second": 1e-12 * rate,
                "share_of_sustained": rate / rates.matrix if rates else None,
                "share_assumed": assumed(product),
            }
        )
    return {
        "machine": machine(device),
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "of_a_step": of_a_step(listed, rows),
        "products": rows,
    }


def as_computed(product: Product, patch_size: int, device: torch.device, dtype: torch.dtype) -> Product:
    """With the columns that are padding; its FLOPs are those of the product without them."""
    return replace(product, k=pixel_columns(patch_size, dtype, device)) if product.layer == "patches" else product


def assumed(product: Product) -> float:
    """What plan/step_model.py takes its share of the sustained rate for."""
    return PATCHES_SHARE if product.layer == "patches" else SHARES[product.network, product.kind]


def of_a_step(listed: list[Product], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums by network and kind, and of all: milliseconds a step, and TFLOP/s."""
    milliseconds: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    for product, row in zip(listed, rows, strict=True):
        for key in (f"{product.network}, {product.kind}", "all"):
            milliseconds[key] += product.count * row["milliseconds"]
            flops[key] += product.flops
    return {
        key: {"milliseconds": total, "tflop_per_second": 1e-9 * flops[key] / total}
        for key, total in milliseconds.items()
    }


def seconds_of(product: Product, device: torch.device, dtype: torch.dtype) -> float:
    """Of one product, by as many in a row as take SECONDS."""
    left, right = operands(product, device, dtype)
    out = torch.mm(left, right)

    def timed(times: int) -> float:
        start = moment(device)
        for _ in range(times):
            torch.mm(left, right, out=out)
        return (moment(device) - start) / times

    for _ in range(WARM_UP):
        timed(1)
    return timed(max(1, round(SECONDS / max(timed(2), 1e-6))))


def operands(product: Product, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As autograd of a linear layer has them: inputs rows x k, weights n x k, gradients rows x n; none is copied."""
    rows, k, n = int(product.rows), product.k, product.n

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    if product.kind == FORWARD:
        return matrix(rows, k), matrix(n, k).t()
    if product.kind == INPUT_GRADIENT:
        return matrix(rows, n), matrix(n, k)
    return matrix(rows, n).t(), matrix(rows, k)
