"""The tests of this folder once more, with the Triton kernels in Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.accuracy import INTERPRETED

FOLDER = Path(__file__).resolve().parent


def test_the_kernels_pass_in_the_interpreter():
    if INTERPRETED:
        return  # this is that process
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
