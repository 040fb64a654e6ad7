"""A GPU's steps through DeepSpeed at every ZeRO stage, with the feed, attention kernel and compiled blocks of a run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.processes import ENVIRONMENT, ROOT

SCRIPT = "import sys; from tests.engine import worker_device; worker_device.run(sys.argv[1])"
# Losses and gradient norms, relative. Measured on a CPU, with its definitions: 2e-7 and 3e-3. A GPU adds in another
# order than the plain loop on the CPU, which AdamW enlarges where gradients are near 0.
ROUNDING = {"fp32": 1e-3, "bf16": 3e-2}


pytestmark = pytest.mark.xdist_group("device")  # one process runs them all, and the script of facts() once


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = tmp_path_factory.mktemp("device") / "facts.json"
    environment = {**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}  # the rest of ENVIRONMENT hides the GPU
    command = [sys.executable, "-c", SCRIPT, str(path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(path.read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", ["fp32", "bf16", "bf16 blocks"])
def test_training_on_a_gpu_equals_a_plain_loop(facts, stage, case):
    found, precision = facts[f"{stage} {case}"], case.split()[0]
    assert found["applied"] and found["target_is_ema"]
    assert found["on"] == ["cuda:0"]
    if precision == "bf16" and torch.cuda.get_device_capability()[0] >= 8:
        assert found["attention"] != "sdpa"
    losses, norms = zip(*facts["plain"], strict=True)
    np.testing.assert_allclose(found["losses"], losses, rtol=ROUNDING[precision])
    np.testing.assert_allclose(found["norms"], norms, rtol=ROUNDING[precision])
