"""A tiny I-JEPA, its batches and its engine, for tests of engine/ that run inside ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ijepa_scale.engine import zero
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.optim import make_optimizer, parameter_groups
from ijepa_scale.masking.packing import Masks, pack_masks
from ijepa_scale.models.blocks import Block, ViTSize, recompute
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.ijepa import IJepa

GLOBAL_BATCH = 8
BETAS = (0.9, 0.95)
SEED = 7
GRID_SIDE = 4

Weights = dict[str, torch.Tensor]


def build_encoder() -> VisionTransformer:
    return VisionTransformer(ViTSize(width=32, depth=2, heads=2, mlp_width=64), image_size=32, patch_size=8)


def build_model(compiled: bool = False, recompute_every: tuple[int, int] = (0, 0), **terms: Any) -> IJepa:
    """recompute_every: of the context encoder's, the predictor's blocks. terms: IJepa's variance, covariance, total."""
    encoder = build_encoder()
    predictor = Predictor(ViTSize(width=16, depth=1, heads=2, mlp_width=32), encoder_width=32, grid=encoder.grid)
    recompute(encoder.blocks, recompute_every[0])
    recompute(predictor.predictor_blocks, recompute_every[1])
    model = IJepa(encoder, predictor, build_encoder(), **terms)
    for block in model.modules():
        if isinstance(block, Block):
            block.compiled = compiled
    return model


def first_weight(name: str, shape: torch.Size, seed: int = SEED) -> torch.Tensor:
    """As an I-JEPA's: the target encoder starts as the context encoder."""
    return initial_weight(name.replace("target_encoder.", "context_encoder."), shape, seed)


def groups_of(model: Any, muon: bool = False) -> list[dict[str, Any]]:
    """As training makes them of an I-JEPA."""
    networks = {"context_encoder": model.context_encoder, "predictor": model.predictor}
    pairs = zip(model.context_encoder.parameters(), model.target_encoder.parameters(), strict=True)
    return parameter_groups(networks, pairs, Block if muon else ())


def global_batch(step: int) -> tuple[torch.Tensor, list, list]:
    """Images (GLOBAL_BATCH, 3, 32, 32) uint8, contexts of 3 to 8 patches and two target blocks of 4 an image."""
    rng = np.random.default_rng(step)
    images = torch.from_numpy(rng.integers(0, 256, (GLOBAL_BATCH, 3, 32, 32), dtype=np.uint8))
    context = [np.sort(rng.choice(16, rng.integers(3, 9), replace=False)) for _ in range(GLOBAL_BATCH)]
    corners = rng.integers(0, GRID_SIDE - 1, (GLOBAL_BATCH, 2, 2))
    block = np.array([0, 1, GRID_SIDE, GRID_SIDE + 1])
    return images, context, [[block + row * GRID_SIDE + column for row, column in image] for image in corners]


def whole_batch(step: int) -> tuple[torch.Tensor, Masks]:
    images, context, target_blocks = global_batch(step)
    return images, pack_masks(context, target_blocks, GRID_SIDE**2)


def micro_batches(step: int, ranks: Ranks, accumulation: int) -> list[tuple[torch.Tensor, Masks]]:
    """This rank's micro-batches of a step, cut as data/collate.py cuts them."""
    images, context, target_blocks = global_batch(step)
    size = GLOBAL_BATCH // (ranks.world_size * accumulation)
    parts = []
    for micro in range(accumulation):
        first = (micro * ranks.world_size + ranks.rank) * size
        part = slice(first, first + size)
        parts.append((images[part], pack_masks(context[part], target_blocks[part], GRID_SIDE**2)))
    return parts


def start_engine(
    ranks: Ranks,
    *,
    zero_stage: int,
    precision: str,
    accumulation: int = 1,
    clip: float = 0.0,
    gradient_dtype: str = "fp32",
    muon: bool = False,
    offload: bool = False,
    seed: int = SEED,
    terms: dict[str, Any] | None = None,
    before_ema: Callable[[Any], None] = lambda engine: None,
) -> tuple[Any, ShardedEMA]:
    settings = zero.deepspeed_config(
        zero_stage=zero_stage,
        precision=precision,
        micro_batch_size=GLOBAL_BATCH // (ranks.world_size * accumulation),
        accumulation_steps=accumulation,
        clip_grad_norm=clip,
        gradient_dtype=gradient_dtype,
        offload=offload,
        # small buckets where gradients are accumulated, one a group elsewhere: a plain loop is beside both
        extra={"zero_optimization": {"reduce_bucket_size": 2000}} if accumulation > 1 and zero_stage < 3 else None,
    )
    with zero.building_context(settings):
        model = build_model(total=ranks.total, **(terms or {}))
    engine = zero.initialize(
        model,
        settings,
        lambda name, shape: first_weight(name, shape, seed),
        lambda module: make_optimizer(groups_of(module, muon), BETAS),
        whole=Block,
    )
    before_ema(engine)
    return engine, ShardedEMA(engine, model.twins())


def moments(engine: Any, kind: str) -> list[torch.Tensor]:
    """AdamW's exp_avg or exp_avg_sq, one a flat of masters(); zero before the first step."""
    state = engine.optimizer.optimizer.state
    return [state[flat].get(kind, torch.zeros_like(flat)) for flat in zero.masters(engine.optimizer)]


def gathered(engine: Any, ranks: Ranks, flats: list[torch.Tensor | None]) -> Weights:
    """Whole tensors by parameter name, put together from all ranks' parts of the flats, on every rank."""
    own = []
    for part in zero.fragments(engine.optimizer):
        flat = flats[part.flat]
        if flat is not None:
            values = flat.detach().narrow(0, part.offset, part.numel)
            own.append((part.name, part.start, values.cpu().numpy()))  # which pickles 20 times as fast as a tensor
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, start, array in (piece for rank in ranks.gather(own) for piece in rank):
        pieces.setdefault(name, []).append((start, torch.from_numpy(array)))
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda piece: piece[0])
        end = 0
        for start, values in parts:
            assert start == end, f"{name}: a part starts at {start}, the one before ends at {end}"
            end += values.numel()
        whole[name] = torch.cat([values for _, values in parts])
    return whole


def weights_of(engine: Any, prefix: str) -> Weights:
    """The weights that the forward uses, whole and flat, as DeepSpeed itself gathers them. Collective under ZeRO-3."""
    import deepspeed

    weights = {}
    if not zero.is_stage3(engine.optimizer):
        engine.optimizer.wait()
    for name, parameter in engine.module.named_parameters():
        if name.startswith(prefix):
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().cpu().clone().flatten()
    if dist.is_initialized():
        dist.barrier()
    return weights


def largest_difference(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[name].float().flatten() - b[name].float().flatten()).abs().max()) for name in a)


def bits_equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].flatten(), b[name].flatten()) for name in a)
