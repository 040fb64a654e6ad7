"""What a device can do at most, and what memory this process has used."""

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch


def memory_bytes() -> int:
    """The most memory used so far: if it uses CUDA that of this process's tensors on its device, else its resident set.

    CUDA's is PyTorch's max_memory_allocated(): fragmentation and the context (nvidia-smi shows them) come on top.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak starts, on Linux, at the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def free_memory() -> int:
    """Bytes of the machine's memory that a process can still take, its page cache included (Linux; else all of it)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Most TFLOP/s in (bf16, tf32, fp32) by torch's name of the device: dense, as published, bf16 accumulated in fp32. Not
# listed are names that stand for several devices; parts of a device (MIG) have names of their own and match none.
PEAKS = {
    # A100 data sheet
    r"A100-(SXM4-[48]0GB|PCIE-40GB)|A100 80GB PCIe": (312.0, 156.0, 19.5),
    # H100 architecture white paper, table 2; H100 and H200 data sheets, whose tensor figures are with sparsity
    r"H100 80GB HBM3|H200|GH200 (480GB|120GB|144G HBM3e)": (989.4, 494.7, 66.9),
    r"H100 PCIe": (756.0, 378.0, 51.2),
    r"H100 NVL|H200 NVL": (835.5, 417.5, 60.0),
    # HGX B200 data sheet, an eighth of its figures; GB200 NVL72's, a 72nd of them
    r"B200": (2250.0, 1125.0, 75.0),
    r"GB200": (2500.0, 1250.0, 80.0),
    # L40S, L4 and A10 data sheets
    r"L40S": (362.0, 183.0, 91.6),
    r"L4": (121.0, 60.0, 30.3),
    r"A10": (125.0, 62.5, 31.2),
    # white papers of GA102, Ada (GeForce and professional) and RTX Blackwell
    r"GeForce RTX 3090": (71.0, 35.6, 35.6),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"GeForce RTX 4090": (165.2, 82.6, 82.6),
    r"RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    r"GeForce RTX 5090": (209.5, 104.8, 104.8),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """The most FLOP/s of a device in precision bf16, tf32 or fp32, dense; None where the device is not in the table."""
    for names, rates in PEAKS.items():
        if re.fullmatch(f"(NVIDIA )?({names})", device_name):
            return 1e12 * dict(zip(("bf16", "tf32", "fp32"), rates, strict=True))[precision]
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """The same of a device of this machine, at the training precision bf16 or fp32. None on a CPU."""
    if device.type != "cuda":
        return None
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), "tf32" if tf32 else precision)


def rates(*, model: float, hardware: float, seconds: float, devices: int, peak: float | None) -> dict[str, Any]:
    """A step's keys of a record. model, hardware: FLOPs of all devices. peak: of one, in FLOP/s; None: not known.

    mfu and hfu are shares of the peak, and only there where it is known.
    """
    keys = {"model_flops": model, "hardware_flops": hardware, "flops_per_second_per_device": model / seconds / devices}
    if peak:
        keys |= {"mfu": model / seconds / devices / peak, "hfu": hardware / seconds / devices / peak}
    return keys
