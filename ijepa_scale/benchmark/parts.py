"""The parts of a check of a GPU, in order: what each measures, at which size, and within how many seconds."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.benchmark import suites
from ijepa_scale.benchmark.alone import STEPS, alone
from ijepa_scale.benchmark.attention import self_tests, time_attention
from ijepa_scale.benchmark.device import measure_device, rates_of
from ijepa_scale.benchmark.matmuls import time_products
from ijepa_scale.benchmark.step import benchmark
from ijepa_scale.benchmark.timing import Say
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.plan.step_model import Rates

# A model of the least size, and as many images, for a check of the check: on any machine, in seconds a part.
TOY = ["model.width=48", "model.depth=2", "predictor.width=48", "predictor.depth=2", "predictor.heads=2"]
TOY += ["loss.variance=0", "loss.covariance=0", "optimization.micro_batch_size=4"]
TOY_STEPS = 12
ON_GPU = ("kernels", "models", "engine", "objectives", "benchmark")  # rooms whose tests need one, as make gpu-tests
# After which a suite of pytest's begins no further test; it has a part's time to end in. All tests took 165 s on an
# H100, with as much work beside them.
TESTS_SECONDS, KERNELS_SECONDS = 150.0, 90.0


@dataclass(frozen=True)
class Check:
    """out: the folder of the results. toy: small sizes, for which a CPU will do."""

    out: Path
    toy: bool
    say: Say

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def config(self, name: str, *overrides: str) -> PretrainConfig:
        return load_config("tiny", [*TOY, *overrides]) if self.toy else load_config(name, list(overrides))

    def rates(self) -> Rates | None:
        """What the first part found; None where it has failed."""
        path = self.out / "device.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return None if "error" in found or not found else rates_of(found)


Results = Iterator[tuple[str, dict[str, Any]]]  # (name of a file, what to write there), each as it is known


@dataclass(frozen=True)
class Part:
    """seconds: after which it is ended. files: the names of its results."""

    seconds: float
    files: tuple[str, ...]
    run: Callable[[Check], Results]


def device(check: Check) -> Results:
    large = (256 << 20, 4 << 30)
    found = measure_device(
        check.device,
        side=256 if check.toy else 8192,
        seconds=1.0 if check.toy else 5.0,
        copied=(1 << 20,) if check.toy else large,
        say=check.say,
    )
    check.say(
        f"{found['matrix_flop_per_second'] / 1e12:,.1f} TFLOP/s sustained, a copy reads and writes "
        f"{found['copy_bytes_per_second'] / 1e9:,.0f} GB/s"
    )
    yield "device", found


def tests(check: Check) -> Results:
    kernels = self_tests(check.config("vith14"), check.device)
    on_gpu = ("-m", "gpu", "-n", str(suites.PROCESSES), "--dist", "loadgroup", *(f"tests/{room}" for room in ON_GPU))
    chosen = ("tests/kernels/test_ema.py",) if check.toy else on_gpu
    found = suites.run_tests(*chosen, seconds=TESTS_SECONDS, say=check.say)
    wrong = [said for said in kernels.values() if said != "right"]
    yield "tests", {**found, "attention_kernels": kernels, "faults": found["faults"] + wrong}


def step(check: Check, *, compiled: bool) -> Results:
    config = check.config("vith14", f"engine.compile={str(compiled).lower()}")
    steps, suffix = TOY_STEPS if check.toy else STEPS, "-compiled" * compiled
    for name, found in alone(config, check.out / f"trace{suffix}", rates=check.rates(), say=check.say, steps=steps):
        yield name + suffix, found


def eager(check: Check) -> Results:
    yield from step(check, compiled=False)


def compiled(check: Check) -> Results:
    yield from step(check, compiled=True)


def matmuls(check: Check) -> Results:
    yield "matmuls", time_products(check.config("vith14"), check.device, rates=check.rates(), say=check.say)


def attention(check: Check) -> Results:
    yield "attention", time_attention(check.config("vith14"), check.device, say=check.say)


def baseline(check: Check, *, name: str) -> Results:
    """In a process of its own, as DeepSpeed keeps the process group of the first run that it sets up."""
    found = benchmark(check.config(name), steps=1 if check.toy else 6, say=check.say)
    yield f"step-{name}", {"config": name, "overrides": TOY if check.toy else [], **found}


def kernels(check: Check) -> Results:
    path = check.out / "kernels.json"
    case = ["--case", "vits16-4" if check.device.type == "cpu" else "vith14-128"]
    toy = ["-k", "patches or one_pass"] if check.toy else []
    arguments = ["kernels/benchmarks", "--benchmark-only", "--benchmark-columns=min,median,max", "--keep", str(path)]
    found = suites.run_tests(*arguments, *case, *toy, seconds=KERNELS_SECONDS, say=check.say)
    yield "kernels", {**json.loads(path.read_text()), "suite": found, "faults": found["faults"]}


BASELINES = ("vith14", "vitl16", "vitb16")
PARTS = {
    "device": Part(60, ("device",), device),
    "tests": Part(200, ("tests",), tests),
    "eager": Part(120, ("alone", "trace"), eager),
    "compiled": Part(180, ("alone-compiled", "trace-compiled"), compiled),
    "matmuls": Part(45, ("matmuls",), matmuls),
    "attention": Part(60, ("attention",), attention),
    **{f"step-{name}": Part(60, (f"step-{name}",), partial(baseline, name=name)) for name in BASELINES},
    "kernels": Part(120, ("kernels",), kernels),
}
