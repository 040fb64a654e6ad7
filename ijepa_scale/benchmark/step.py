"""The training step against a dense baseline and against this device's matrix products, on a GPU or a CPU.

All is timed in one process, in turns, so that whatever else the machine does falls on each alike. On a CPU the CPU time
is reported beside elapsed time: it hardly changes when other processes use the cores.
"""

import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_kernels.dispatch import chosen
from ijepa_scale import build
from ijepa_scale.benchmark.dense_baseline import DenseJepa, DenseMasks
from ijepa_scale.benchmark.in_memory import DrawnOnDevice, attention_of, one_process, run_in_memory
from ijepa_scale.benchmark.profiling import profile_steps
from ijepa_scale.benchmark.timing import WARM_UP, Say, Timed, machine, spread, turns, until_it_fits
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.collate import Batch
from ijepa_scale.engine.device import device_peak
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.feed import Feed
from ijepa_scale.engine.optim import make_optimizer, parameter_groups, set_schedules
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.blocks import Block
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.train import train_step

# (m, k, n) of the matmul rate
LARGE_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 1024, 1024)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192)),
}
SLOWEST_PRODUCT = 1.0  # seconds of a large product on a CPU; those that take longer are left out
# FLOPs of a timed run of products, so that starting and awaiting it is lost in it; small ones come so often at most
GPU_PRODUCT_FLOPS, GPU_PRODUCTS = 2e13, 1000
LR, WEIGHT_DECAY, MOMENTUM = 1e-4, 0.05, 0.996


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    config: PretrainConfig
    objective: IJepaObjective
    ranks: Ranks
    precision: str  # fp32 or bf16
    batch: int

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def benchmark(config: PretrainConfig, *, steps: int, say: Say, profile: Path | None = None) -> dict[str, Any]:
    """Time `steps` rounds and return the results, ready for JSON. Raises ValueError where it cannot run.

    profile: a folder; the training step on all context is then traced there, too, or no_profile says why that failed.
    Where a GPU's memory does not hold a step of every run, the batch of all runs is halved until it does.
    """
    if profile:
        profile.mkdir(parents=True, exist_ok=True)
    if config.loss.kind != "smooth_l1":
        raise ValueError(f"the dense baseline's loss is smooth_l1, got loss.kind={config.loss.kind}")
    if config.loss.target_layers:
        raise ValueError(
            f"the dense baseline predicts the last output alone, got loss.target_layers={config.loss.target_layers}; "
            'give loss.target_layers=""'
        )
    # The baseline has no such terms, and no Muon: both are timed with AdamW.
    config = replace(config, loss=replace(config.loss, variance=0.0, covariance=0.0))
    config = replace(config, optimization=replace(config.optimization, optimizer="adamw"))
    with one_process() as ranks:
        objective = DrawnOnDevice.of(build.build_ijepa(config), ranks.device)
        precision = build.training_precision(config, ranks.device)
        asked = config.optimization.micro_batch_size or config.optimization.global_batch_size

        def attempt(batch: int) -> dict[str, Any]:
            return measure(Setting(config, objective, ranks, precision, batch), steps, say, profile)

        return {**until_it_fits(attempt, asked, ranks.device, say), "batch_asked": asked}


def measure(setting: Setting, steps: int, say: Say, profile: Path | None) -> dict[str, Any]:
    equal, ragged = (
        [sampled_masks(setting.objective, setting.batch, step, context) for step in range(steps + WARM_UP)]
        for context in ("batch_min", "all")
    )
    say("building both models")
    with tempfile.TemporaryDirectory() as folder:
        baseline = dense_run(setting, equal)
        training, attention = training_runs(setting, equal, ragged, Path(folder))
        runs = [baseline, *training, *products(setting)]
        retries = turns(runs, steps, say, setting.device)
        found = {**results(setting, runs, steps), "attention": attention}
        if setting.cuda:
            found["allocator_retries"] = retries
        if profile:
            say("tracing a few steps")
            step = training[-1]
            try:
                found["profile"] = {"run": step.name, **profile_steps(step.run, profile, device=setting.device)}
            except (ValueError, RuntimeError) as error:  # what was timed is kept
                found["no_profile"] = str(error)
    return found


def sampled_masks(objective: IJepaObjective, batch: int, step: int, context: str) -> Masks:
    """What training would draw at this step."""
    return replace(objective.draw_masks, context=context)(step, range(batch))


def timed(name: str, step: Callable[[int], None], flops: list[float], masks: list[Masks], state: int) -> Timed:
    """state: bytes of the device that its model holds between steps."""
    tokens = [m.num_images * m.num_patches + m.context.num_tokens + m.prediction.num_tokens for m in masks]
    context = float(np.mean([m.context.num_tokens / m.num_images for m in masks]))
    return Timed(name, step, flops, tokens, context, state)


def random_images(setting: Setting) -> torch.Tensor:
    side = setting.config.data.image_size
    return torch.randint(256, (setting.batch, 3, side, side)).to(torch.uint8).to(setting.device)


def dense_run(setting: Setting, masks: list[Masks]) -> Timed:
    """The baseline's step."""
    device, images = setting.device, random_images(setting)
    dense_masks = [DenseMasks.of(one).to(device) for one in masks]
    start = allocated(device)
    with device, torch.no_grad():
        like = setting.objective.build()
        for name, parameter in like.named_parameters():
            parameter.copy_(setting.objective.initial_weight(name, parameter.shape))
        baseline = DenseJepa(like).to(device)
    del like
    step = baseline_step(setting, baseline, images, dense_masks)
    step(0)  # makes the optimizer's state
    state = allocated(device) - start

    return timed("dense baseline", step, dense_flops(setting, dense_masks), masks, state)


def dense_flops(setting: Setting, masks: list[DenseMasks]) -> list[float]:
    """Of the baseline's step on each of such masks, counted on tensors without values, once for each shape."""
    meta, side = torch.device("meta"), setting.config.data.image_size
    with meta:
        baseline = DenseJepa(build.build_ijepa(setting.config).build()).to(meta)
        images = torch.empty(setting.batch, 3, side, side, dtype=torch.uint8)
    counted: dict[tuple[torch.Size, torch.Size], float] = {}
    shapes = [(one.context_BK.shape, one.targets_BMK.shape) for one in masks]
    for one, shape in zip(masks, shapes, strict=True):
        if shape not in counted:
            with FlopCounterMode(display=False) as counter:
                baseline(images, one.to(meta)).backward()
            counted[shape] = counter.get_total_flops()
    return [counted[shape] for shape in shapes]


def training_runs(setting: Setting, equal: list[Masks], ragged: list[Masks], folder: Path) -> tuple[list[Timed], str]:
    """(train.train_step() on the baseline's masks, and on all the context sampled; the attention kernel's name).

    With engine.compile each is there twice, the first time not compiled.
    """
    images, start = random_images(setting), allocated(setting.device)
    run = run_in_memory(setting.config, setting.objective, setting.ranks, batch=setting.batch, steps=2, folder=folder)
    blocks = [module for module in run.engine.module.modules() if isinstance(module, Block)]

    def training_step(batches: list[Batch], compiled: bool) -> Callable[[int], None]:
        feed = Feed(itertools.cycle([*batches[-WARM_UP:], *batches[:-WARM_UP]]), setting.device)  # as turns() counts

        def step(index: int) -> None:
            for block in blocks:
                block.compiled = compiled
            train_step(run, 0, feed, stop=False, meanwhile=nothing)

        return step

    runs = []
    state = None
    for masks, context in ((equal, ""), (ragged, ", all context")):
        batches = [Batch(images, one.to(setting.device), ()) for one in masks]
        if state is None:
            training_step(batches, False)(0)  # makes the optimizer's state
            state = allocated(setting.device) - start
        flops = [setting.objective.flops.model(Counts.of(one)) for one in masks]
        for compiled in (False, True)[: 1 + setting.config.engine.compile]:
            name = "ijepa-scale" + ", compiled" * compiled + context
            runs.append(timed(name, training_step(batches, compiled), flops, masks, state))
    return runs, attention_of(run)


def nothing() -> None:
    """What the host has to do while the device works."""


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def autocast(setting: Setting) -> torch.autocast:
    """What the baseline's forward runs under: its weights are fp32 in every precision."""
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16")


def baseline_step(setting: Setting, baseline: Any, images: torch.Tensor, masks: list) -> Callable[[int], None]:
    # The implementation that training uses; on a CPU torch's two others are no faster within the noise.
    groups = parameter_groups(setting.objective.trained(baseline), baseline.pairs())
    optimizer = make_optimizer(groups, setting.config.optimization.betas)

    def step(index: int) -> None:
        set_schedules(optimizer.param_groups, lr=LR, weight_decay=WEIGHT_DECAY)
        with autocast(setting):
            loss = baseline(images, masks[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        baseline.update_target(MOMENTUM)

    return step


def products(setting: Setting) -> list[Timed]:
    """Matrix products in the run's precision: of each large shape, and of the encoder's own on a batch's patches."""
    size, config = build.vit_size(setting.config.model), setting.config
    rows = setting.batch * (config.data.image_size // config.model.patch_size) ** 2
    own = ((rows, size.width, 3 * size.width), (rows, size.width, size.mlp_width), (rows, size.mlp_width, size.width))
    like: dict[str, Any] = {
        "device": setting.device,
        "dtype": torch.bfloat16 if setting.precision == "bf16" else torch.float32,
    }

    def product(name: str, shapes: tuple[tuple[int, int, int], ...]) -> Timed:
        operands = [
            (torch.randn(m, k, **like), torch.randn(k, n, **like), torch.empty(m, n, **like)) for m, k, n in shapes
        ]
        flops = sum(2.0 * m * k * n for m, k, n in shapes)
        times = repeats(flops) if setting.cuda else 1

        def run(index: int) -> None:
            for _ in range(times):
                for left, right, out in operands:
                    torch.mm(left, right, out=out)

        return Timed(name, run, [times * flops])

    shapes: tuple[tuple[int, int, int], ...] = LARGE_SHAPES[setting.device.type]
    if not setting.cuda:  # bf16 without instructions for it runs at a hundredth of fp32
        probe = product("probe", ((256, 256, 256),))
        for index in range(2):
            probe.once(index, keep=True, device=setting.device)
        most = SLOWEST_PRODUCT * 1e9 * max(probe.gflops())
        shapes = tuple(shape for shape in shapes if 2.0 * math.prod(shape) <= most)
    large = [product(f"matmul {m} x {k} x {n}", ((m, k, n),)) for m, k, n in shapes]
    return [*large, product("matmul at the encoder's shapes", own)]


def repeats(flops: float) -> int:
    """How often a GPU computes products of so many FLOPs in one timed run."""
    return min(GPU_PRODUCTS, max(1, round(GPU_PRODUCT_FLOPS / flops)))


def results(setting: Setting, runs: list[Timed], steps: int) -> dict[str, Any]:
    config, batch = setting.config, setting.batch
    models = [run for run in runs if run.tokens]
    rates = {run.name: spread(run.gflops()) for run in runs if not run.tokens}
    matmul = max(rate["median"] for rate in rates.values())
    peak = device_peak(setting.device, setting.precision)
    base = models[0]
    rows = []
    for run in models:
        gflops = spread(run.gflops())
        row = {
            "name": run.name,
            "step_seconds": spread(run.wall),
            "images_per_second": spread([batch / seconds for seconds in run.wall]),
            "tokens_per_second": spread([run.tokens[i] / s for i, s in enumerate(run.wall)]),
            "context_tokens_per_image": run.context,
            "gflop_per_step": float(np.mean(run.flops)) / 1e9,
            "gflop_per_second": gflops,
            "share_of_matmul": gflops["median"] / matmul,
            "speedup": spread([theirs / ours for theirs, ours in zip(base.wall, run.wall, strict=True)]),
        }
        if peak:
            row["mfu"] = 1e9 * gflops["median"] / peak
        if setting.cuda:
            row |= {"state_bytes": run.state, "step_bytes": max(run.memory)}
        else:
            row["cpu_seconds"] = spread(run.cpu)
            row["cpu_speedup"] = spread([theirs / ours for theirs, ours in zip(base.cpu, run.cpu, strict=True)])
        rows.append(row)
    return {
        "machine": machine(setting.device),
        "model": {**asdict(config.model), "predictor": asdict(config.predictor), "image_size": config.data.image_size},
        "batch": batch,
        "rounds": steps,
        "precision": setting.precision,
        "zero_stage": config.engine.zero_stage,
        "operations": chosen(setting.device),
        "compile": config.engine.compile,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "steps": rows,
        "matmul_gflop_per_second": matmul,
        "matmuls": rates,
    }
