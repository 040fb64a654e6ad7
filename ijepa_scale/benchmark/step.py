"""The training step against a dense baseline and against this device's matrix products, on a GPU or a CPU.

All is timed in one process, in turns, so that whatever else the machine does falls on each alike. On a CPU the CPU time
is reported beside elapsed time: it hardly changes when other processes use the cores.
"""

import gc
import math
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
from ijepa_scale.benchmark.profiling import profile_steps
from ijepa_scale.benchmark.timing import LAYOUTS, Say, Timed, machine, spread, turns
from ijepa_scale.config import PretrainConfig
from ijepa_scale.engine import distributed, zero
from ijepa_scale.engine.device import device_peak
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.optim import adamw, parameter_groups, set_schedules
from ijepa_scale.masking.packing import Masks
from ijepa_scale.models.attention_backends import Choices
from ijepa_scale.models.blocks import Block
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.objectives.ijepa import IJepaObjective

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
    device: torch.device
    precision: str  # fp32 or bf16
    attention: Choices  # of the training step; the baseline has its own
    batch: int

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
    config = replace(config, loss=replace(config.loss, variance=0.0, covariance=0.0))  # the baseline has no such terms
    ranks = distributed.start()
    try:
        if ranks.world_size > 1:
            raise ValueError(f"the benchmark is one process, got {ranks.world_size}; start it with python")
        device = ranks.device
        precision = build.training_precision(config, device)
        asked = config.optimization.micro_batch_size or config.optimization.global_batch_size
        attention = build.build_attention(config, device=device)
        say(f"attention: {attention.name} ({attention.why})")
        setting = Setting(config, build.build_ijepa(config), device, precision, attention, asked)
        while True:
            try:
                return {**measure(setting, steps, say, profile), "batch_asked": asked}
            except torch.OutOfMemoryError as error:
                short = str(error).splitlines()[0]
            if setting.batch == 1:
                raise ValueError(f"no step fits into {device} beside the weights of both models: {short}")
            setting = replace(setting, batch=setting.batch // 2)
            say(f"out of memory; all runs begin again with {setting.batch} images a step")
            gc.collect()
            if setting.cuda:
                torch.cuda.empty_cache()
    finally:
        ranks.close()


def measure(setting: Setting, steps: int, say: Say, profile: Path | None) -> dict[str, Any]:
    side = setting.config.data.image_size
    images = torch.randint(256, (setting.batch, 3, side, side)).to(torch.uint8).to(setting.device)
    equal, ragged = (
        [sampled_masks(setting.objective, setting.batch, step, context) for step in range(LAYOUTS)]
        for context in ("batch_min", "all")
    )
    say("building both models")
    runs = [*steps_of(setting, images, equal, ragged), *products(setting)]
    retries = turns(runs, steps, say, setting.device)
    found = results(setting, runs, steps)
    if setting.cuda:
        found["allocator_retries"] = retries
    if profile:
        say("tracing a few steps")
        step = [run for run in runs if run.tokens][-1]
        try:
            found["profile"] = {"run": step.name, **profile_steps(step.run, profile, device=setting.device)}
        except (ValueError, RuntimeError) as error:  # what was timed is kept
            found["no_profile"] = str(error)
    return found


def sampled_masks(objective: IJepaObjective, batch: int, step: int, context: str) -> Masks:
    """What training would draw at this step."""
    return replace(objective.draw_masks, context=context)(step, range(batch))


def steps_of(setting: Setting, images: torch.Tensor, equal: list[Masks], ragged: list[Masks]) -> list[Timed]:
    """The baseline's step; the training step on the same masks; the training step on all the context sampled.

    With engine.compile the training step on the same masks is there twice, the first time not compiled.
    """
    return [dense_run(setting, images, equal), *training_runs(setting, images, equal, ragged)]


def timed(
    name: str, step: Callable[[int], None], flops: list[float], images: torch.Tensor, masks: list[Masks], state: int
) -> Timed:
    """state: bytes of the device that its model holds between steps."""
    tokens = [len(images) * m.num_patches + m.context.num_tokens + m.prediction.num_tokens for m in masks]
    context = float(np.mean([m.context.num_tokens / len(images) for m in masks]))
    return Timed(name, step, flops, tokens, context, state)


def dense_run(setting: Setting, images: torch.Tensor, masks: list[Masks]) -> Timed:
    device = setting.device
    dense_masks = [DenseMasks.of(one).to(device) for one in masks]
    start = allocated(device)
    with device, torch.no_grad():
        like = setting.objective.build()
        for name, parameter in like.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, device))
        baseline = DenseJepa(like).to(device)
    del like
    step = baseline_step(setting, baseline, images, dense_masks)
    step(0)  # makes the optimizer's state
    state = allocated(device) - start

    def counted(masks: DenseMasks) -> float:
        with FlopCounterMode(display=False) as counter:
            baseline(images, masks).backward()
        baseline.zero_grad()
        return counter.get_total_flops()

    with autocast(setting):
        flops = [counted(one) for one in dense_masks]
    return timed("dense baseline", step, flops, images, masks, state)


def training_runs(setting: Setting, images: torch.Tensor, equal: list[Masks], ragged: list[Masks]) -> list[Timed]:
    on_device = [[one.to(setting.device) for one in masks] for masks in (equal, ragged)]
    start = allocated(setting.device)
    engine, ema = training_engine(setting)
    blocks = [module for module in engine.module.modules() if isinstance(module, Block)]

    def training_step(masks: list[Masks], compiled: bool) -> Callable[[int], None]:
        def step(index: int) -> None:
            for block in blocks:
                block.compiled = compiled
            groups = engine.optimizer.optimizer.param_groups
            set_schedules(groups, lr=LR, weight_decay=WEIGHT_DECAY, ema_momentum=MOMENTUM)
            engine.backward(engine(images, masks[index % LAYOUTS])["loss"])
            engine.step()
            ema.update()

        return step

    training_step(on_device[0], False)(0)
    state = allocated(setting.device) - start
    compiled = setting.config.engine.compile
    runs = [("ijepa-scale", on_device[0], equal, False)]
    if compiled:
        runs.append(("ijepa-scale, compiled", on_device[0], equal, True))
    all_context = "ijepa-scale, compiled, all context" if compiled else "ijepa-scale, all context"
    runs.append((all_context, on_device[1], ragged, compiled))
    return [
        timed(
            name,
            training_step(masks, compiles),
            [setting.objective.flops.model(Counts.of(one)) for one in host],
            images,
            host,
            state,
        )
        for name, masks, host, compiles in runs
    ]


def drawn(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """A weight as training's are at first, but for the draw, which on a GPU takes no time."""
    return 0.02 * torch.randn(shape, device=device) if len(shape) > 1 else initial_weight(name, shape, seed=0)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def autocast(setting: Setting) -> torch.autocast:
    """What the baseline's forward runs under: its weights are fp32 in every precision."""
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16")


def baseline_step(setting: Setting, baseline: Any, images: torch.Tensor, masks: list) -> Callable[[int], None]:
    # The implementation that training uses; on a CPU torch's two others are no faster within the noise.
    groups = parameter_groups(setting.objective.trained(baseline), baseline.pairs())
    optimizer = adamw(groups, setting.config.optimization.betas)

    def step(index: int) -> None:
        set_schedules(optimizer.param_groups, lr=LR, weight_decay=WEIGHT_DECAY)
        with autocast(setting):
            loss = baseline(images, masks[index % LAYOUTS])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        baseline.update_target(MOMENTUM)

    return step


def training_engine(setting: Setting) -> tuple[Any, ShardedEMA]:
    """What run.set_up() makes of the config, with weights drawn on the device."""
    config = setting.config
    settings = zero.deepspeed_config(
        zero_stage=config.engine.zero_stage,
        precision=setting.precision,
        micro_batch_size=setting.batch,
        accumulation_steps=1,
        clip_grad_norm=config.optimization.clip_grad_norm,
        gradient_dtype=config.engine.gradient_dtype,
        extra=config.engine.deepspeed,
    )
    with setting.device:
        return build.build_engine(
            setting.objective,
            settings,
            betas=config.optimization.betas,
            attend=setting.attention.attend,
            initial=lambda name, shape: drawn(name, shape, setting.device),
        )


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
            "tokens_per_second": spread([run.tokens[i % LAYOUTS] / s for i, s in enumerate(run.wall)]),
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
        "attention": setting.attention.name,
        "compile": config.engine.compile,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "steps": rows,
        "matmul_gflop_per_second": matmul,
        "matmuls": rates,
    }
