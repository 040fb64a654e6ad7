"""The benchmarks run on a CPU, with the definitions: what stops them there stops them on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases import CASES, case_of
from tests.kernels.accuracy import INTERPRETED

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing of it is a kernel")


def test_a_case_has_tokens_of_every_kind():
    case = case_of(*CASES[0])
    for packed in (case.masks.context, case.masks.target_blocks, case.masks.prediction):
        assert len(packed.indices_T) > case.images


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda file: file.stem)
def test_each_runs(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", str(file)]
    # Under pytest-xdist, by whose variables pytest-benchmark would turn itself off, too.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=BENCHMARKS.parents[1], env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "definition" in done.stdout
