"""engine.offload_optimizer=cpu against the same training without, on real ranks."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.engine import worker_offload as worker
from tests.processes import ENVIRONMENT, ROOT, assert_all, run_ranks

CLIP = 0.15  # below every gradient norm of these steps


def case(stage: int, precision: str, accumulation: int, clip: float = 0.0, muon: bool = False) -> dict[str, Any]:
    return {
        "zero_stage": stage,
        "precision": precision,
        "accumulation": accumulation,
        "clip": clip,
        "muon": muon,
    }


QUICK = [case(1, "fp32", 1), case(3, "bf16", 2), case(2, "bf16", 2, CLIP, muon=True)]
MORE = [
    case(stage, precision, accumulation, clip, muon)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for accumulation, clip, muon in ((1, 0.0, False), (2, CLIP * (precision == "fp32"), False), (1, 0.0, True))
]


@pytest.mark.parametrize(
    "ranks, cases",
    [
        (2, QUICK),
        pytest.param(1, MORE, marks=pytest.mark.slow),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(3, QUICK[:2], marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_the_state_on_the_host(ranks, cases, tmp_path):
    """Bit for bit; at ZeRO-3 with clipping within the rounding of the norm, whose sum DeepSpeed orders otherwise."""
    path = tmp_path / "facts.json"
    assert_all(run_ranks(worker.run, ranks, tmp_path, str(path), cases, timeout=500))
    for one, facts in zip(cases, json.loads(path.read_text()), strict=True):
        usual, offloaded, expected = facts["applied"]
        assert usual == offloaded == expected, one
        rounding = 1e-6 if one["zero_stage"] == 3 and one["clip"] else 0.0
        assert facts["losses"] <= rounding, one
        assert max(facts["differences"].values()) <= rounding, (one, facts["differences"])
        assert facts["norms"] <= 1e-6, one
        assert facts["moved"] > 1e-5, "nothing was trained, so nothing was compared"
        assert facts["apart"], "masters or averages are the weights themselves: they cannot be on the host"
        assert facts["usual_apart"] == (one["precision"] == "bf16"), "so this would be seen"
        expected_ways = ["gradients"] if one["zero_stage"] == 3 else ["gradient", "target", "weight"]
        assert facts["travelling"] == expected_ways, one


@pytest.mark.gpu
def test_on_a_gpu_the_state_is_on_the_host_and_what_travels_is_page_locked(tmp_path):
    """AdamW's rounding there and here differs, so training agrees within it."""
    path, cases = tmp_path / "facts.json", [case(stage, "bf16", 1) for stage in (1, 2, 3)]
    code = f"from tests.engine import worker_offload; worker_offload.run({str(path)!r}, {cases!r})"
    environment = {**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}  # the rest of ENVIRONMENT hides the GPU
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for facts in json.loads(path.read_text()):
        assert facts["usual_on"] == ["cuda"] and facts["on"] == ["cpu"] and facts["pinned"]
        assert facts["differences"]["masters"] < 1e-3 and facts["losses"] < 1e-2
