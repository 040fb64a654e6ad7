"""What a device is and what it sustains: facts, clocks, large matrix products for seconds on end, copies."""

import importlib.metadata
import shutil
import statistics
import subprocess
from typing import Any

import torch

from ijepa_scale.benchmark.timing import Say, machine, moment
from ijepa_scale.engine.device import device_peak
from ijepa_scale.models.attention_backends import BACKENDS
from ijepa_scale.plan.step_model import Rates

# nvidia-smi's names of what says how fast a GPU may run, and what holds it back.
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"
PACKAGES = ("torch", "triton", "deepspeed", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4")
WINDOW_SECONDS = 0.5
COPIES, COPY_WARM_UP = 20, 3


def measure_device(
    device: torch.device, *, side: int, seconds: float, copied: tuple[int, ...], say: Say
) -> dict[str, Any]:
    """Facts of the device, and its Rates: "matrix_flop_per_second" and "copy_bytes_per_second".

    side: of the square matrices multiplied, in bf16 on a GPU and fp32 on a CPU. seconds: for which they are. copied:
    bytes of each copy.
    """
    return {
        "machine": machine(device),
        **facts(device),
        **sustained(device, side=side, seconds=seconds, say=say),
        **copies(device, copied),
    }


def rates_of(found: dict[str, Any]) -> Rates:
    """Of what measure_device() found."""
    return Rates(matrix=found["matrix_flop_per_second"], copy=found["copy_bytes_per_second"])


def facts(device: torch.device) -> dict[str, Any]:
    installed = {one.metadata["name"].lower(): one.version for one in importlib.metadata.distributions()}
    found: dict[str, Any] = {
        "packages": {name: installed.get(name) for name in PACKAGES},
        "attention_kernels": {name: importable(name) for name in BACKENDS},
    }
    if device.type != "cuda":
        return found | {"not_here": "a CPU: no capability, memory, driver or clocks"}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "driver": ask_driver("driver_version"),
        "peak_flop_per_second": device_peak(device, "bf16"),
    }


def importable(name: str) -> str:
    """ "yes", or why an attention kernel cannot be imported."""
    try:
        BACKENDS[name].load()
    except (ImportError, OSError) as error:  # which is the answer
        return " ".join(str(error).split())
    return "yes"


def ask_driver(what: str) -> str:
    """nvidia-smi's answer for the first GPU."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={what}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return " ".join((done.stdout or done.stderr).split())


def sustained(device: torch.device, *, side: int, seconds: float, say: Say) -> dict[str, Any]:
    """The rate of square matrix products of normal numbers: the median of the windows in the second half of the time.

    A GPU is fast until it is warm and its power is at its limit: each window has its rate, and the clocks within it.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    flops = 2.0 * side**3

    def window(times: int) -> tuple[float, str]:
        """(FLOP/s, clocks while it ran)."""
        start = moment(device)
        for _ in range(times):
            torch.mm(left, right, out=out)
        end = moment(device)
        clocks = ask_driver(CLOCKS) if device.type == "cuda" else ""
        return times * flops / (end - start), clocks

    window(3)
    rate, _ = window(10)
    times = max(1, round(WINDOW_SECONDS * rate / flops))
    count = max(2, round(seconds / WINDOW_SECONDS))
    say(f"{count} windows of {times} products of {side} x {side} x {side}")
    windows = [window(times) for _ in range(count)]
    rates = [rate for rate, _ in windows]
    return {
        "matrix_shape": [side, side, side],
        "matrix_dtype": str(dtype).removeprefix("torch."),
        "matrix_flop_per_second": statistics.median(rates[count // 2 :]),
        "matrix_windows": [{"flop_per_second": rate, "clocks": clocks} for rate, clocks in windows],
        "clocks_are": CLOCKS if device.type == "cuda" else "",
    }


def copies(device: torch.device, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Bytes a second that copies on the device read and write, by size; the best counts."""
    found = {}
    for size in sizes:
        source = torch.zeros(size, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        seconds = []
        for _ in range(COPY_WARM_UP + COPIES):
            start = moment(device)
            target.copy_(source)
            seconds.append(moment(device) - start)
        found[str(size)] = 2 * size / statistics.median(seconds[COPY_WARM_UP:])
    return {"copy_bytes_per_second": max(found.values()), "copies": found}
