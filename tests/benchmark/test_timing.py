"""Turns, and where results are kept."""

import torch

from ijepa_scale.benchmark.timing import MEASUREMENTS, WARM_UP, Timed, machine, measurements, turns


def test_turns_reverse_and_warm_up_is_not_kept():
    order, says = [], []
    runs = [Timed(name, lambda index, name=name: order.append((name, index)), [1.0]) for name in "ab"]
    assert turns(runs, 2, says.append, torch.device("cpu")) == 0
    assert order[-4:] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [len(run.wall) for run in runs] == [2, 2] and len(says) == WARM_UP + 2


def test_results_of_one_kind_of_device_share_a_folder():
    assert measurements({"gpu": "NVIDIA H100 80GB HBM3", "cpu": "x"}) == MEASUREMENTS / "nvidia-h100-80gb-hbm3"
    cpu = {"cpu": "Intel(R) Xeon(R) Gold 6430", "cores": 64}
    assert measurements(cpu) == MEASUREMENTS / "intel-xeon-gold-6430-64-cores"
    assert "gpu" not in machine(torch.device("cpu"))
