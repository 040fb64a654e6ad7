"""What a config amounts to: parameters, tokens, FLOPs, images, steps. Nothing is trained and no GPU is needed."""

import itertools
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.sources.inspection import inspect_source
from ijepa_scale.data.sources.remote import is_remote
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.samples import PREVIEWED, preview_images
from ijepa_scale.engine.zero import BUCKET
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.models.vit import bytes_kept
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.masks import BlockMasks
from ijepa_scale.plan import checks

SAMPLED_STEPS, SAMPLED_IMAGES = 200, 16  # layouts the token statistics are taken over


def count_tokens(blocks: MultiBlock, context: str) -> Counts:
    """Means an image over layouts."""
    masks = BlockMasks(blocks, context)
    lengths, block_tokens, targets = [], [], []
    for step in range(SAMPLED_STEPS):
        contexts, target_blocks = masks.draw(step, range(SAMPLED_IMAGES))
        lengths.append([part.size for part in contexts])
        targets.append([np.unique(part).size for part in target_blocks])
        block_tokens.append([part.shape[1] for part in target_blocks])
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


def dry_run(config: PretrainConfig, *, ranks: int = 1) -> str:
    """The text of --dry-run. Networks are built on the meta device: any size fits.

    ValueError where a run of as many ranks would be refused on a machine of the right kind: by the same checks, of what
    can be read here without a copy. A config without a source passes, and what lies elsewhere is not looked up.
    """
    blocks = checks.check(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks.settings(config, ranks=ranks, device=device)
    if device.type == "cuda":  # else it is another machine that the kernel is for
        build.build_attention(config, device=device)
    images, said = _images(config)
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
    """(images of an epoch, 0 where that is unknown; what to say of them). Copies and renders nothing."""
    data = config.data
    paths = [path for path, _ in data.mixed_sources]
    where = {path: _where(config, path) for path in paths}
    counts = {"scenes": data.num_images or build.DEFAULT_SCENES}
    name = "data.source"
    if known := _with_sources(config, [path for path in paths if where[path] == "here"]):
        images = build.open_sources(known, preview_images)
        if set(where.values()) == {"here"}:
            build.check_enough(config, images.name, len(images))
        build.check_opened(known, images)
        name = images.name
        parts = images.parts if isinstance(images, Mixture) else [images]
        sizes = [part.num_images for part in (images.sources if isinstance(images, Streams) else parts)]
        counts |= zip((path for path, _ in known.data.mixed_sources), sizes, strict=True)
        _check_eval_images(config, list(itertools.takewhile(lambda path: where[path] == "here", paths)))
    said = [] if paths else ["data.source is not set, and training needs it"]
    for path in paths:
        if path not in counts:
            said.append(f"{path} is no file or folder here: taken for a Hub id or URL, and not looked up")
        else:
            said.append(f"{counts[path]:,} in {path}:{data.split}" if counts[path] else f"{path} is not counted")
    sizes = [counts.get(path, 0) for path in paths]
    images_in_all = sum(sizes) if all(sizes) else 0
    if not images_in_all or (data.streaming and data.num_images):
        images_in_all = data.num_images
        said += [f"{images_in_all:,} by data.num_images"] if images_in_all else []
    build.check_enough(config, name, images_in_all)
    if paths and "hub" not in where.values():  # what lies there may be counted by then
        build.build_horizon(config, images_in_all)
    return images_in_all, "; ".join(said)


def _where(config: PretrainConfig, path: str) -> str:
    """Where a source lies: "here" if it can be looked at without rendering it and without a network."""
    if path == "scenes":
        return "scenes"
    kind, _ = inspect_source(path, config.data.column)
    if kind == "list" and config.data.streaming and is_remote(path):
        return "urls"
    return "hub" if kind == "hub" else "here"


def _with_sources(config: PretrainConfig, paths: list[str], **changes: Any) -> PretrainConfig | None:
    """The config with those of its sources alone; None without any."""
    mixed = [{"path": path, "weight": weight} for path, weight in config.data.mixed_sources if path in paths]
    return replace(config, data=replace(config.data, source=mixed), **changes) if mixed else None


def _check_eval_images(config: PretrainConfig, paths: list[str]) -> None:
    """The images of health checks and the report, of the sources up to the first that is not here; but a few."""
    report, logging = config.report, config.logging
    few = replace(
        report, train_images=min(report.train_images, PREVIEWED), test_images=min(report.test_images, PREVIEWED)
    )
    with tempfile.TemporaryDirectory() as folder:  # what is kept of streams is kept there
        fewer = replace(logging, health_images=min(logging.health_images, PREVIEWED))
        if known := _with_sources(config, paths, report=few, logging=fewer, run_dir=folder):
            build.build_eval_images(known, preview_images)


def _steps_line(config: PretrainConfig, images: int, flops_an_image: float) -> str:
    options = config.optimization
    if not images and not options.max_steps:
        return (
            "steps          unknown: give data.num_images=N (how many images the source has) or optimization.max_steps"
        )
    horizon = build.build_horizon(config, images)
    run_flops = horizon.total * options.global_batch_size * flops_an_image
    epochs = f" ({options.epochs} epochs of {horizon.steps_per_epoch:,})" if not options.max_steps else ""
    return (
        f"steps          {horizon.total:,}{epochs} of {options.global_batch_size:,} images, "
        f"warm-up {horizon.warmup:,}; {run_flops:.2e} FLOPs in all"
    )
