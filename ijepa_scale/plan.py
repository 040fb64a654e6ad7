"""What a config amounts to: parameters, tokens, FLOPs, images, steps. Nothing is trained and no GPU is needed."""

import numpy as np
import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.images import count_images
from ijepa_scale.data.order import generator_for
from ijepa_scale.data.remote import Patience, is_remote
from ijepa_scale.data.sources import inspect_source
from ijepa_scale.data.stream_sources import open_shards
from ijepa_scale.engine.zero import BUCKET
from ijepa_scale.flops import Counts
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes, place_blocks
from ijepa_scale.models.vit import bytes_kept

SAMPLED_STEPS, SAMPLED_IMAGES = 200, 16  # layouts the token statistics are taken over


def count_tokens(blocks: MultiBlock, context: str) -> Counts:
    """Means an image over layouts."""
    lengths, block_tokens, targets = [], [], []
    for step in range(SAMPLED_STEPS):
        sizes = block_sizes(blocks, generator_for(0, 0, step))
        placed = [place_blocks(blocks, sizes, generator_for(0, 1, step, image)) for image in range(SAMPLED_IMAGES)]
        kept = [image.context.size for image in placed]
        targets.append([np.unique(image.target_blocks).size for image in placed])
        if context == "batch_min":
            kept = [min(kept)] * SAMPLED_IMAGES
        elif context != "all":
            kept = [min(length, int(context)) for length in kept]
        lengths.append(kept)
        block_tokens.append([sizes.target[0] * sizes.target[1]] * SAMPLED_IMAGES)
    seen, block = np.array(lengths, dtype=float), np.array(block_tokens, dtype=float)
    both, number = seen + block, blocks.num_target_blocks
    return Counts(
        images=1,
        targets=float(np.mean(targets)),
        context=float(seen.mean()),
        context_pairs=float((seen**2).mean()),
        blocks=float(number * block.mean()),
        prediction=float(number * both.mean()),
        prediction_pairs=float(number * (both**2).mean()),
    )


def dry_run(config: PretrainConfig) -> str:
    """The text of --dry-run. Networks are built on the meta device: any size fits."""
    images, said = _images(config)
    blocks = build.build_blocks(config)
    with torch.device("meta"):
        model = build.build_model(config, initialize=False)
    parameters = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("context encoder", model.context_encoder), ("predictor", model.predictor))
    }
    tokens = count_tokens(blocks, config.mask.context)
    flops = build.build_flops(config).parts(tokens)
    total, number = sum(flops.values()), config.mask.num_target_blocks
    size = model.context_encoder.size
    lines = [
        f"encoder        {config.model.name}/{config.model.patch_size}: width {size.width}, depth {size.depth}, "
        f"heads {size.heads}, MLP {size.mlp_width}; {config.data.image_size} px, "
        f"{blocks.grid.rows} x {blocks.grid.columns} patches",
        f"parameters     context encoder {parameters['context encoder'] / 1e6:,.1f} M, predictor "
        f"{parameters['predictor'] / 1e6:,.1f} M, target encoder as the context encoder (EMA)",
        _state_line(config, parameters),
        f"tokens         an image, means: target encoder {blocks.grid.num_patches}, context {tokens.context:.1f} "
        f"(mask.context={config.mask.context}), {number} target blocks of {tokens.blocks / number:.1f}, "
        f"predictor {number} x {tokens.prediction / number:.1f}",
        f"model FLOPs    {total / 1e9:,.2f} G an image: "
        + ", ".join(f"{name} {100 * part / total:.0f}%" for name, part in flops.items()),
        _kept_line(config, tokens),
        f"images         {said}",
        _steps_line(config, images, total),
    ]
    return "\n".join(lines)


def state_bytes(zero_stage: int, *, trained: int, encoder: int) -> tuple[int, int]:
    """What lies on a GPU at the end of a backward in bf16 beside the activations: on each, and cut among them.

    trained, encoder: parameters that are trained, and those of them that have an EMA.
    """
    weights, targets, gradients, halves = 2 * trained, 2 * encoder, 4 * trained, 2 * trained
    masters = 12 * trained + 4 * encoder  # and two moments; EMA
    return {
        1: (weights + targets + gradients + halves, masters),  # gradients in bf16, and added up in fp32
        2: (weights + targets + 2 * 2 * BUCKET, masters + gradients),  # two buckets in bf16
        3: (4 * BUCKET, masters + gradients + weights + targets),
    }[zero_stage]


def _state_line(config: PretrainConfig, parameters: dict[str, int]) -> str:
    stage = config.engine.zero_stage
    whole, cut = state_bytes(stage, trained=sum(parameters.values()), encoder=parameters["context encoder"])
    return (
        f"state          in bf16 {whole / 2**30:,.2f} GiB on each GPU, {cut / 2**30:,.2f} GiB cut among them "
        f"(ZeRO-{stage}): weights, gradients, masters, moments, EMA"
    )


def _kept_line(config: PretrainConfig, tokens: Counts) -> str:
    every = config.engine.recompute_every
    images = config.optimization.micro_batch_size or config.optimization.global_batch_size
    encoder, predictor = (
        images * count * bytes_kept(size, n, itemsize=2) / 2**30
        for count, size, n in zip(
            (tokens.context, tokens.prediction),
            (build.vit_size(config.model), build.predictor_size(config)),
            every,
            strict=True,
        )
    )
    return (
        f"activations    kept in bf16 for the backward: context encoder {encoder:,.2f} GiB, predictor "
        f"{predictor:,.2f} GiB of {images} image{'s' * (images > 1)} "
        f"(engine.activation_checkpointing={config.engine.activation_checkpointing})"
    )


def _images(config: PretrainConfig) -> tuple[int, str]:
    """(images of an epoch, 0 where that is unknown; what to say of them). Copies and renders nothing.

    ValueError for a source that is not here, or that cannot be read as the config says.
    """
    data = config.data
    found = [(path, _count(config, path)) for path, _ in data.mixed_sources]
    said = [] if found else ["data.source is not set, and training needs it"]
    for path, count in found:
        if count is None:
            said.append(f"{path} is no file or folder here: taken for a Hub id or URL, and not looked up")
        else:
            said.append(f"{count:,} in {path}:{data.split}" if count else f"{path} is not counted")
    images = sum(count or 0 for _, count in found)
    if not found or not all(count for _, count in found) or (data.streaming and data.num_images):
        images = data.num_images
        said += [f"{images:,} by data.num_images"] if images else []
    return images, "; ".join(said)


def _count(config: PretrainConfig, path: str) -> int | None:
    """Images of a source: 0 where nothing tells before they are read, None where that is not on this machine."""
    data = config.data
    if path == "scenes":
        return data.num_images or build.DEFAULT_SCENES
    kind, _ = inspect_source(path, data.column)
    if kind == "hub" or (kind == "list" and data.streaming and is_remote(path)):
        return None
    if not data.streaming:
        return count_images(path, split=data.split, **build.reading(config))
    return open_shards(path, split=data.split, **build.reading(config), patience=Patience(0)).num_images


def _steps_line(config: PretrainConfig, images: int, flops_an_image: float) -> str:
    options = config.optimization
    if not images and not options.max_steps:
        return (
            "steps          unknown: give data.num_images=N (how many images the source has) or optimization.max_steps"
        )
    if 0 < images < options.global_batch_size:
        raise ValueError(f"{images} images are fewer than optimization.global_batch_size {options.global_batch_size}")
    horizon = build.build_horizon(config, images)
    run_flops = horizon.total * options.global_batch_size * flops_an_image
    epochs = f" ({options.epochs} epochs of {horizon.steps_per_epoch:,})" if not options.max_steps else ""
    return (
        f"steps          {horizon.total:,}{epochs} of {options.global_batch_size:,} images, "
        f"warm-up {horizon.warmup:,}; {run_flops:.2e} FLOPs in all"
    )
