"""What is said of a device; how fast any is, is not asked here."""

import subprocess

import torch

from ijepa_scale.benchmark import device
from ijepa_scale.plan.step_model import Rates

CPU = torch.device("cpu")


def test_a_cpu_is_measured_and_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(device, "WINDOW_SECONDS", 0.02)
    said = []
    found = device.measure_device(CPU, side=32, seconds=0.2, copied=(1 << 12, 1 << 16), say=said.append)
    windows = [one["flop_per_second"] for one in found["matrix_windows"]]
    assert len(windows) == 10 and min(windows[5:]) <= found["matrix_flop_per_second"] <= max(windows[5:])
    assert found["copy_bytes_per_second"] == max(found["copies"].values()) and len(found["copies"]) == 2
    assert found["not_here"].startswith("a CPU") and found["packages"]["torch"]
    assert found["packages"]["flash-attn-3"] is None
    assert found["attention_kernels"]["fa3"] == "No module named 'flash_attn_interface'"
    assert device.rates_of(found) == Rates(matrix=found["matrix_flop_per_second"], copy=found["copy_bytes_per_second"])


def test_the_driver_is_asked_by_its_own_program(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.ask_driver("name") == "no nvidia-smi"
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    answers = {"--query-gpu=name": ("NVIDIA H100 80GB HBM3\n", ""), "--query-gpu=odd": ("", "not a valid field\n")}

    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, *answers[command[2]])

    monkeypatch.setattr(device.subprocess, "run", run)
    assert device.ask_driver("name") == "NVIDIA H100 80GB HBM3"
    assert device.ask_driver("odd") == "not a valid field"
