"""A model of I-JEPA's training step on one GPU, in bf16: FLOPs and bytes by category, and the time they should take.

By arithmetic, not by measurement: the FLOPs are those of objectives/flops.py, product by product; bytes are what the
operations read and write as the code stands; what a device makes of them is assumed, and an argument.
T tokens, D width, B bytes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.ijepa import IJepaObjective

MATRIX, ATTENTION, ELEMENTWISE = "matrix products", "attention", "elementwise"
REDUCTIONS, TAIL, COPIES, IDLE = "reductions and norms", "optimizer and EMA", "copies", "idle"

TARGET, CONTEXT, PREDICTOR = "target encoder", "context encoder", "predictor"  # as StepFlops.parts() names them
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device sustains. matrix: FLOP/s of large bf16 products; copy: B/s that a copy reads and writes."""

    matrix: float
    copy: float


# Shares of the sustained matrix rate, assumed: products of many rows come near it, weight gradients sum over them, the
# predictor's have a K of 384, the patch embedding's K is a patch's pixels, of which some are padding.
SHARES = {
    (TARGET, FORWARD): 610 / 700,
    (CONTEXT, FORWARD): 600 / 700,
    (CONTEXT, INPUT_GRADIENT): 600 / 700,
    (CONTEXT, WEIGHT_GRADIENT): 520 / 700,
    (PREDICTOR, FORWARD): 390 / 700,
    (PREDICTOR, INPUT_GRADIENT): 390 / 700,
    (PREDICTOR, WEIGHT_GRADIENT): 390 / 700,
}
PATCHES_SHARE = 0.6
# Flash attention pads heads to multiples of 32 and sequences to tiles of 128 rows; its backward is 2.5 forwards.
ATTENTION_SHARE, HEAD_STEP, TILE, ATTENTION_BACKWARD = 200 / 700, 32, 128, 2.5

# What a block's passes over memory move, (what, category, B a token per D, B a token per MLP width): in kernels, and
# where blocks run through torch.compile (docs/lab/kernels.md). "Sums that products read" are read inside a product.
PASSES = {
    "forward": (
        ("LayerNorms and sums", REDUCTIONS, 12, 0),
        ("sums that products read", MATRIX, 4, 0),
        ("GELU", ELEMENTWISE, 0, 4),
    ),
    "backward": (
        ("LayerNorms, their parameters, residual", REDUCTIONS, 17.6, 0),
        ("bias of queries, keys and values", REDUCTIONS, 6, 0),
        ("GELU and its bias", ELEMENTWISE, 0, 6.1),
    ),
}
COMPILED_PASSES = {
    "forward": (
        ("LayerNorms and sums", REDUCTIONS, 12, 0),
        ("residual and bias", ELEMENTWISE, 6, 0),
        ("GELU", ELEMENTWISE, 0, 4),
    ),
    "backward": (
        ("LayerNorms, their parameters, residual", REDUCTIONS, 20.2, 0),
        ("bias sums", REDUCTIONS, 10.2, 2),
        ("GELU", ELEMENTWISE, 0, 6),
    ),
}
# B a trained parameter, and more for one that has an EMA: engine/sharded_adamw.py on one GPU, without accumulation.
TAIL_BYTES = {"gradients into their buckets": 4, "norm": 2, "AdamW and bf16 weights": 28}
EMA_BYTES = 10
GAPS_SECONDS = 1.4e-3  # in which nothing runs


@dataclass(frozen=True)
class Product:
    """A linear layer's matrix product, `count` times a step: rows x k times k x n, or a gradient of it.

    All take as many FLOPs. kind: FORWARD; INPUT_GRADIENT, rows x n times n x k; WEIGHT_GRADIENT, n x rows times
    rows x k.
    """

    network: str
    layer: str
    kind: str
    rows: float
    k: int
    n: int
    count: int

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.k * self.n * self.count


@dataclass(frozen=True, kw_only=True)
class Work:
    """A part of the step. phase: forward, backward or tail. network: "" where it is of none."""

    category: str
    what: str
    network: str
    phase: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0


def products(objective: IJepaObjective, counts: Counts) -> list[Product]:
    """Every matrix product of a step, attention's left out. counts: of the micro-batch, not of an image."""
    encoder, predictor = objective.encoder, objective.predictor
    target = replace(encoder, depth=objective.layers[-1])
    pixels, whole = 3 * objective.patch_size**2, counts.images * objective.grid.num_patches
    every = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
    found = [
        *_layer(TARGET, "patches", (FORWARD,), whole, pixels, encoder.width),
        *_blocks(TARGET, target, (FORWARD,), whole, counts.targets),
        *_layer(CONTEXT, "patches", (FORWARD, WEIGHT_GRADIENT), counts.context, pixels, encoder.width),
        *_blocks(CONTEXT, encoder, every, counts.context, counts.context),
        *_layer(PREDICTOR, "embed", every, counts.context, encoder.width, predictor.width),
        *_blocks(PREDICTOR, predictor, every, counts.prediction, counts.blocks),
        *_layer(PREDICTOR, "proj out", every, counts.blocks, predictor.width, objective.out_width),
    ]
    return [one for one in found if one.count]


def _layer(
    network: str, layer: str, kinds: tuple[str, ...], rows: float, k: int, n: int, count: int = 1
) -> list[Product]:
    return [Product(network, layer, kind, rows, k, n, count) for kind in kinds]


def _blocks(network: str, size: ViTSize, kinds: tuple[str, ...], tokens: float, last: float) -> Iterator[Product]:
    """last: the rows that are left after the last block's attention."""
    width, depth = size.width, size.depth
    yield from _layer(network, "qkv", kinds, tokens, width, 3 * width, depth)
    for layer, k, n in (("proj", width, width), ("fc1", width, size.mlp_width), ("fc2", size.mlp_width, width)):
        if last == tokens:
            yield from _layer(network, layer, kinds, tokens, k, n, depth)
        else:
            yield from _layer(network, layer, kinds, tokens, k, n, depth - 1)
            yield from _layer(network, layer, kinds, last, k, n)


def model_step(
    objective: IJepaObjective,
    counts: Counts,
    *,
    trained: int,
    averaged: int,
    rates: Rates,
    compiled: bool = False,
) -> list[Work]:
    """All work of a step of one micro-batch on one GPU, in bf16, without activation checkpointing.

    counts: of the micro-batch. trained, averaged: parameters that are trained, and those of them that have an EMA.
    compiled: whether blocks run through torch.compile.
    """
    encoder, predictor = objective.encoder, objective.predictor
    whole, patches = counts.images * objective.grid.num_patches, objective.grid.num_patches
    blocks = objective.draw_masks.blocks.num_target_blocks
    work = [_product_work(one, rates) for one in products(objective, counts)]
    for network, size, tokens, pairs, sequences in (
        (TARGET, replace(encoder, depth=objective.layers[-1]), whole, whole * patches, counts.images),
        (CONTEXT, encoder, counts.context, counts.context_pairs, counts.images),
        (PREDICTOR, predictor, counts.prediction, counts.prediction_pairs, counts.images * blocks),
    ):
        phases = ("forward",) if network == TARGET else ("forward", "backward")
        for phase in phases:
            work.append(_attention(network, phase, size, tokens, pairs, sequences, rates))
            work += _passes(network, phase, size, tokens, rates, compiled)
    work += [_moved(ELEMENTWISE, what, "", phase, moved, rates) for what, phase, moved in _ends(objective, counts)]
    tail = {what: each * trained for what, each in TAIL_BYTES.items()} | {"EMA": EMA_BYTES * averaged}
    work += [_moved(TAIL, what, "", "tail", moved, rates) for what, moved in tail.items()]
    work.append(Work(category=IDLE, what="gaps", network="", phase="tail", seconds=GAPS_SECONDS))
    return work


def _product_work(one: Product, rates: Rates) -> Work:
    share = PATCHES_SHARE if one.layer == "patches" else SHARES[one.network, one.kind]
    return Work(
        category=MATRIX,
        what=f"{one.layer}, {one.kind}",
        network=one.network,
        phase="forward" if one.kind == FORWARD else "backward",
        seconds=one.flops / (share * rates.matrix),
        flops=one.flops,
    )


def _attention(
    network: str, phase: str, size: ViTSize, tokens: float, pairs: float, sequences: float, rates: Rates
) -> Work:
    """flops: what the method needs; its time is that of what the kernel does with padding."""
    rows = TILE * math.ceil(tokens / sequences / TILE)
    head = HEAD_STEP * math.ceil(size.width / size.heads / HEAD_STEP)
    padded = 4 * head * size.heads * sequences * rows**2 * size.depth
    return Work(
        category=ATTENTION,
        what="attention",
        network=network,
        phase=phase,
        seconds=padded * (ATTENTION_BACKWARD if phase == "backward" else 1) / (ATTENTION_SHARE * rates.matrix),
        flops=4 * size.width * pairs * size.depth * (2 if phase == "backward" else 1),
    )


def _passes(network: str, phase: str, size: ViTSize, tokens: float, rates: Rates, compiled: bool) -> Iterator[Work]:
    passes = COMPILED_PASSES if compiled else PASSES
    for what, category, a_width, an_mlp_width in passes[phase]:
        moved = (a_width * size.width + an_mlp_width * size.mlp_width) * tokens * size.depth
        yield _moved(category, what, network, phase, moved, rates)


def _ends(objective: IJepaObjective, counts: Counts) -> list[tuple[str, str, float]]:
    """(what, phase, bytes) outside of the blocks, each tensor read or written once: bf16 values, uint8 pixels."""
    width, narrow = objective.encoder.width, objective.predictor.width
    whole = counts.images * objective.grid.num_patches
    return [
        ("patches", "forward", 3 * 3 * objective.patch_size**2 * (whole + counts.context)),
        ("positions", "forward", 4 * width * (whole + counts.context)),
        ("rows of the target", "forward", (4 + 4 * len(objective.layers)) * width * counts.targets),
        ("predictor's input", "forward", 4 * narrow * counts.prediction),
        ("predictor's input", "backward", 4 * narrow * counts.prediction),
        ("loss", "forward", 2 * objective.out_width * (2 * counts.blocks + counts.targets)),
        ("loss", "backward", 4 * objective.out_width * counts.blocks),
    ]


def _moved(category: str, what: str, network: str, phase: str, moved: float, rates: Rates) -> Work:
    return Work(category=category, what=what, network=network, phase=phase, seconds=moved / rates.copy, bytes=moved)


def by_category(work: Iterable[Work]) -> dict[str, dict[str, float]]:
    """milliseconds, flops and bytes of each category, ready for JSON."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"milliseconds": 0.0, "flops": 0.0, "bytes": 0.0})
    for one in work:
        sums = found[one.category]
        sums["milliseconds"] += 1e3 * one.seconds
        sums["flops"] += one.flops
        sums["bytes"] += one.bytes
    return dict(found)


def in_words(work: list[Work], *, images: int, device: str, rates: Rates, slower: float) -> str:
    """A line of --dry-run: what is estimated, from what. slower: a step's time over what the model says."""
    seconds = slower * sum(one.seconds for one in work)
    share = sum(one.flops for one in work) / seconds / rates.matrix
    parts = ", ".join(f"{name} {slower * sums['milliseconds']:,.3g}" for name, sums in by_category(work).items())
    return (
        f"estimate       by arithmetic, not measured: one {device} ({rates.matrix / 1e12:,.0f} TFLOP/s in "
        f"large products, {rates.copy / 1e12:,.3g} TB/s) takes {1e3 * seconds:,.3g} ms for a step of {images} "
        f"image{'s' * (images > 1)} in bf16: {images / seconds:,.0f} images/s, {100 * share:.0f}% of that rate; "
        f"ms: {parts}"
    )
