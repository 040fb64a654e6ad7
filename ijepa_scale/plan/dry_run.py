"""What a config amounts to: parameters, tokens, FLOPs, images, steps. Nothing is trained and no GPU is needed."""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.sources.inspection import inspect_source
from ijepa_scale.data.sources.remote import is_remote
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.samples import PREVIEWED, preview_images
from ijepa_scale.masking.packing import Masks
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.objectives.objective import Expected, Objective
from ijepa_scale.plan import checks, memory, step_model
from ijepa_scale.plan.clusters import GPUS
from ijepa_scale.plan.memory import Model, Sharding
from ijepa_scale.plan.sampling import sample

ESTIMATED = ("h100", "a100-80g")  # of plan/clusters.py; launch/plan.py has all


def dry_run(config: PretrainConfig, *, ranks: int = 1, objective: Objective | None = None) -> str:
    """The text of --dry-run. Networks are built on the meta device: any size fits.

    ValueError where a run of as many ranks would be refused on a machine of the right kind: by the same checks, of what
    can be read here without a copy. A config without a source passes, and what lies elsewhere is not looked up.
    """
    objective = objective or build.build_objective(config)
    objective.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    micro_batch_size, _, settings = checks.settings(config, objective, ranks=ranks, device=device)
    attention = _attention_line(config, objective, device)
    images, said = _images(config)
    model = memory.model_of(objective, config.optimization.optimizer)
    masks = sample(objective, micro_batch_size).masks
    expected = objective.expected(masks)
    total = sum(expected.flops.values())
    size, grid = build.vit_size(config.model), objective.grid
    lines = [
        f"encoder        {config.model.name}/{config.model.patch_size}: width {size.width}, depth {size.depth}, "
        f"heads {size.heads}, MLP {size.mlp_width}; {config.data.image_size} px, "
        f"{grid.rows} x {grid.columns} patches",
        *_parameter_lines(objective, model, memory.sharding_of(settings, ranks=ranks)),
        attention,
        f"tokens         an image, means: {expected.tokens}",
        f"model FLOPs    {total / 1e9:,.2f} G an image: "
        + ", ".join(f"{name} {100 * part / total:.0f}%" for name, part in expected.flops.items()),
        _kept_line(config, expected, micro_batch_size),
        *_estimate_lines(config, objective, model, masks, micro_batch_size),
        f"images         {said}",
        _steps_line(config, images, total),
    ]
    return "\n".join(lines)


def _attention_line(config: PretrainConfig, objective: Objective, device: torch.device) -> str:
    if device.type == "cuda":
        choices = build.build_attention(config, device=device, objective=objective)
        return f"attention      {choices.name} ({choices.why})"
    predictor = f", predictor.attention={config.predictor.attention}" if config.predictor.attention else ""
    return f"attention      model.attention={config.model.attention}{predictor}: chosen and tested where it trains"


def parameter_counts(objective: Objective, module: torch.nn.Module) -> tuple[dict[str, int], int]:
    """(parameters of each network that is trained, those of them that have an EMA)."""
    trained = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in objective.trained(module).items()
    }
    return trained, sum(parameter.numel() for parameter, _ in objective.averaged(module))


def _parameter_lines(objective: Objective, model: Model, sharding: Sharding) -> list[str]:
    trained, averaged = parameter_counts(objective, model.module)
    state = memory.state(model, sharding)
    parts = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    parts |= {"EMA": state.ema} if averaged else {}
    host = f", and {state.host / 2**30:,.2f} GiB of the host's memory" * bool(state.host)
    gpus = f"each of {sharding.ranks} GPUs" if sharding.ranks > 1 else "one GPU"
    return [
        "parameters     "
        + ", ".join(f"{name.replace('_', ' ')} {count / 1e6:,.1f} M" for name, count in trained.items())
        + f", an EMA of {averaged / 1e6:,.1f} M of them" * bool(averaged),
        f"state          in bf16 {state.total / 2**30:,.2f} GiB on {gpus} (ZeRO-{sharding.zero_stage}): "
        + ", ".join(f"{name} {held / 2**30:,.2f}" for name, held in parts.items())
        + host
        + "; on others: launch/plan.py",
    ]


def _kept_line(config: PretrainConfig, expected: Expected, images: int) -> str:
    parts = ", ".join(f"{name} {images * kept / 2**30:,.2f} GiB" for name, kept in expected.kept_bytes.items())
    return (
        f"activations    kept in bf16 for the backward: {parts} of {images} image{'s' * (images > 1)} "
        f"(engine.activation_checkpointing={config.engine.activation_checkpointing})"
    )


def _estimate_lines(
    config: PretrainConfig, objective: Objective, model: Model, masks: Sequence[Masks], images: int
) -> list[str]:
    """The time of a step of I-JEPA on the usual GPUs; of another objective nothing is known."""
    if not isinstance(objective, IJepaObjective):
        return []
    counts = Counts.mean([Counts.of(one) for one in masks]).times(images)
    parameters = {"trained": model.trained, "averaged": model.averaged}
    lines = []
    for name in ESTIMATED:
        gpu = GPUS[name]
        rates = gpu.sustained
        work = step_model.model_step(objective, counts, **parameters, rates=rates, compiled=config.engine.compile)
        line = step_model.in_words(work, images=images, device=gpu.torch_name, rates=rates, slower=gpu.slower)
        lines.append(line)
        if config.engine.activation_checkpointing != "none":
            lines[-1] += "; without activation checkpointing"
    return lines


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
