"""Images a second of the training step on CPU, against a dense baseline and this machine's matrix products.

All is timed in one process, in turns, so that whatever else the machine does falls on each alike. CPU time is reported
beside elapsed time: it hardly changes when other processes use the cores.
"""

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.collate import BLOCKS, CONTEXT, SIZES
from ijepa_scale.data.order import generator_for
from ijepa_scale.engine import distributed, zero
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.flops import Counts
from ijepa_scale.masking.multiblock import block_sizes, place_blocks
from ijepa_scale.masking.packing import Masks, limit_context, pack_masks
from ijepa_scale.models.ijepa import initial_weight
from ijepa_scale.optim import adamw, parameter_groups, set_schedules

BASELINE = Path(__file__).resolve().parents[1] / "tests" / "reference" / "dense_jepa.py"
LAYOUTS = 4  # batches of masks that the steps cycle through
LARGE_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 1024, 1024))  # (m, k, n) of the matmul rate
LR, WEIGHT_DECAY, MOMENTUM = 1e-4, 0.05, 0.996

Say = Callable[[str], None]


@dataclass
class Timed:
    """Something run in turns with the others. run: one step, or one product of each shape, by the round's number."""

    name: str
    run: Callable[[int], None]
    flops: list[float]  # of one run, by layout
    tokens: list[int] = field(default_factory=list)  # context, target and predictor tokens of one run, by layout
    wall: list[float] = field(default_factory=list)  # seconds, by round
    cpu: list[float] = field(default_factory=list)

    def once(self, index: int, *, keep: bool) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(index)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if keep:
            self.wall.append(wall)
            self.cpu.append(cpu)

    def gflops(self) -> list[float]:
        """GFLOP/s, by round."""
        return [self.flops[i % len(self.flops)] / seconds / 1e9 for i, seconds in enumerate(self.wall)]


def benchmark(config: PretrainConfig, *, steps: int, say: Say) -> dict[str, Any]:
    """Time `steps` rounds and return the results, ready for JSON. Raises ValueError where it cannot run."""
    dense = load_baseline()
    if torch.cuda.is_available():
        raise ValueError("this benchmark times a CPU; hide the GPUs: CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu ...")
    if config.loss.kind != "smooth_l1":
        raise ValueError(f"the dense baseline's loss is smooth_l1, got loss.kind={config.loss.kind}")
    config = replace(config, loss=replace(config.loss, variance=0.0, covariance=0.0))  # the baseline has no such terms
    ranks = distributed.start()
    try:
        if ranks.world_size > 1:
            raise ValueError(f"the benchmark is one process, got {ranks.world_size}; start it with python")
        batch = config.optimization.micro_batch_size or config.optimization.global_batch_size
        images = torch.randint(256, (batch, 3, config.data.image_size, config.data.image_size)).to(torch.uint8)
        equal, ragged = (
            [sampled_masks(config, batch, step, c) for step in range(LAYOUTS)] for c in ("batch_min", "all")
        )
        runs = [*steps_of(config, dense, images, equal, ragged), *products(config, batch)]
        turns(runs, steps, say)
        return results(config, batch, runs, steps)
    finally:
        ranks.close()


def load_baseline() -> ModuleType:
    """tests/reference/dense_jepa.py, which an installed package does not hold."""
    if not BASELINE.is_file():
        raise ValueError(
            f"the dense baseline {BASELINE} is missing: run the benchmark from a checkout of the repository"
        )
    spec = importlib.util.spec_from_file_location("dense_jepa", BASELINE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampled_masks(config: PretrainConfig, batch: int, step: int, context: str) -> Masks:
    """What training would draw at this step."""
    blocks, seed = build.build_blocks(config), config.seed
    sizes = block_sizes(blocks, generator_for(seed, SIZES, step))
    placed = [place_blocks(blocks, sizes, generator_for(seed, BLOCKS, step, position)) for position in range(batch)]
    rngs = [generator_for(seed, CONTEXT, step, position) for position in range(batch)]
    contexts = limit_context([image.context for image in placed], context, rngs)
    return pack_masks(contexts, [list(image.target_blocks) for image in placed], blocks.grid.num_patches)


def steps_of(
    config: PretrainConfig, dense: ModuleType, images: torch.Tensor, equal: list[Masks], ragged: list[Masks]
) -> list[Timed]:
    """The baseline's step; the training step on the same masks; the training step on all the context sampled."""
    baseline = dense.DenseJepa(build.build_model(config))
    dense_masks = [dense.DenseMasks.of(masks) for masks in equal]
    engine, ema = training_engine(config, len(images))

    def training_step(masks: list[Masks]) -> Callable[[int], None]:
        def step(index: int) -> None:
            set_schedules(engine.optimizer.optimizer.param_groups, lr=LR, weight_decay=WEIGHT_DECAY)
            loss = engine(images, masks[index % LAYOUTS])["loss"]
            engine.backward(loss)
            engine.step()
            ema.update(MOMENTUM)
            loss.item()

        return step

    def counted(masks: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            baseline(images, masks).backward()
        baseline.zero_grad()
        return counter.get_total_flops()

    def needed(masks: Masks) -> float:
        return build.build_flops(config).model(Counts.of(masks))

    def tokens(masks: Masks) -> int:
        return len(images) * masks.num_patches + masks.context.num_tokens + masks.prediction.num_tokens

    return [
        Timed(
            "dense baseline",
            baseline_step(config, baseline, images, dense_masks),
            [counted(masks) for masks in dense_masks],
            [tokens(masks) for masks in equal],
        ),
        *(
            Timed(name, training_step(masks), [needed(m) for m in masks], [tokens(m) for m in masks])
            for name, masks in (("ijepa-scale", equal), ("ijepa-scale, all context", ragged))
        ),
    ]


def baseline_step(config: PretrainConfig, baseline: Any, images: torch.Tensor, masks: list) -> Callable[[int], None]:
    # The implementation that training uses; on a CPU torch's two others are no faster within the noise.
    optimizer = adamw(parameter_groups(baseline), config.optimization.betas)

    def step(index: int) -> None:
        set_schedules(optimizer.param_groups, lr=LR, weight_decay=WEIGHT_DECAY)
        loss = baseline(images, masks[index % LAYOUTS])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        baseline.update_target(MOMENTUM)
        loss.item()

    return step


def training_engine(config: PretrainConfig, batch: int) -> tuple[Any, ShardedEMA]:
    """What run.set_up() makes of the config, in fp32."""
    settings = zero.deepspeed_config(
        zero_stage=config.engine.zero_stage,
        precision="fp32",
        micro_batch_size=batch,
        accumulation_steps=1,
        clip_grad_norm=config.optimization.clip_grad_norm,
        extra=config.engine.deepspeed,
    )
    with zero.building_context(settings):
        model = build.build_model(config, initialize=False)
    engine = zero.initialize(
        model,
        settings,
        lambda name, shape: initial_weight(name, shape, config.seed),
        lambda module: adamw(parameter_groups(module), config.optimization.betas),
    )
    return engine, ShardedEMA(engine, model.twins())


def products(config: PretrainConfig, batch: int) -> list[Timed]:
    """fp32 matrix products: of each large shape, and of the encoder's own shapes on all patches of the batch."""
    size = build.vit_size(config.model)
    rows = batch * (config.data.image_size // config.model.patch_size) ** 2
    own = ((rows, size.width, 3 * size.width), (rows, size.width, size.mlp_width), (rows, size.mlp_width, size.width))

    def product(name: str, shapes: tuple[tuple[int, int, int], ...]) -> Timed:
        operands = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in shapes]

        def run(index: int) -> None:
            for left, right, out in operands:
                torch.mm(left, right, out=out)

        return Timed(name, run, [sum(2.0 * m * k * n for m, k, n in shapes)])

    large = [product(f"matmul {m} x {k} x {n}", ((m, k, n),)) for m, k, n in LARGE_SHAPES]
    return [*large, product("matmul at the encoder's shapes", own)]


def turns(runs: list[Timed], steps: int, say: Say) -> None:
    """Rounds in the order A B C, C B A, ...; the first LAYOUTS are warm-up."""
    for index in range(-LAYOUTS, steps):
        for run in runs if index % 2 == 0 else runs[::-1]:
            run.once(index, keep=index >= 0)
        say(f"warm-up {index + LAYOUTS + 1} of {LAYOUTS}" if index < 0 else f"round {index + 1} of {steps}")


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def results(config: PretrainConfig, batch: int, runs: list[Timed], steps: int) -> dict[str, Any]:
    models = [run for run in runs if run.tokens]
    rates = {run.name: spread(run.gflops()) for run in runs if not run.tokens}
    matmul = max(rate["median"] for rate in rates.values())
    base = models[0]
    rows = []
    for run in models:
        gflops = spread(run.gflops())
        rows.append(
            {
                "name": run.name,
                "step_seconds": spread(run.wall),
                "cpu_seconds": spread(run.cpu),
                "images_per_second": spread([batch / seconds for seconds in run.wall]),
                "tokens_per_second": spread([run.tokens[i % LAYOUTS] / s for i, s in enumerate(run.wall)]),
                "gflop_per_step": float(np.mean(run.flops)) / 1e9,
                "gflop_per_second": gflops,
                "share_of_matmul": gflops["median"] / matmul,
                "speedup": spread([theirs / ours for theirs, ours in zip(base.wall, run.wall, strict=True)]),
                "cpu_speedup": spread([theirs / ours for theirs, ours in zip(base.cpu, run.cpu, strict=True)]),
            }
        )
    return {
        "machine": machine(),
        "model": {**asdict(config.model), "predictor": asdict(config.predictor), "image_size": config.data.image_size},
        "batch": batch,
        "rounds": steps,
        "precision": "fp32",
        "zero_stage": config.engine.zero_stage,
        "steps": rows,
        "matmul_gflop_per_second": matmul,
        "matmuls": rates,
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
