"""A short soak; tests/soak/run.py runs as long as one likes."""

import json
import os
import subprocess
import sys

import pytest

from tests.processes import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_two_minutes_of_faults_lose_nothing(tmp_path):
    command = [sys.executable, ROOT / "tests" / "soak" / "run.py", "--seconds", "120", "--seed", "5", "--out", tmp_path]
    ended = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    faults = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert len(faults) >= 2 and not any(fault["failed"] for fault in faults), ended.stdout  # a slow machine does two
    assert "| **all** |" in ended.stdout
