"""The package without its checkout: a wheel, installed into a fresh folder, run from another one."""

import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest

from tests.processes import ROOT

COMMAND = """
import sys
from pathlib import Path
import ijepa_kernels, ijepa_scale
for package in (ijepa_kernels, ijepa_scale):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
from ijepa_scale.benchmark import tables
try:
    tables.writable(None, keep=True)
except ValueError as error:
    print(error)
from ijepa_scale.visualize.page import render_page
assert render_page("a", "b", []).startswith("<!doctype html>")
from ijepa_scale.verbs.command import main
main(["pretrain", "--config", "tiny", "--dry-run"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this tree is installed into, alone."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("ijepa_scale", "configs", "kernels"):
        shutil.copytree(ROOT / name, folder / "tree" / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder], folder / "tree", os.environ)
    (wheel,) = folder.glob("*.whl")
    run([*pip, "install", wheel, "--no-deps", "--target", folder / "installed"], folder, os.environ)
    return folder / "installed"


def run(command, cwd, environment):
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_package_does_what_a_checkout_does(installed, tmp_path):
    """The command, a config by its name, the kernels' package; what needs a checkout says so."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, installed / "bin" / "ijepa-scale"]
    text = run([*command, "--help"], tmp_path, environment)
    for verb in (ROOT / "launch").glob("*.py"):
        assert f"\n  {verb.stem} " in text
    assert run([*command, "--version"], tmp_path, environment) == "ijepa-scale 0.1.0\n"
    assert "usage: ijepa-scale pretrain " in run([*command, "pretrain", "--help"], tmp_path, environment)

    text = run([sys.executable, "-c", COMMAND, installed], tmp_path, environment)
    assert "--keep writes to a checkout, and there is no" in text and "use --json" in text
    assert "\nencoder        vit_tiny/8" in text and "\nsteps          624" in text
    assert list(tmp_path.iterdir()) == []
