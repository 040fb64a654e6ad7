"""Every command and example of docs/export.md, as it stands there, on a small run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.export import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text()
COMMANDS = {
    line.split("--format ")[1].split()[0]: line.split()
    for block in re.findall(r"```bash\n(.*?)\n```", PAGE, re.DOTALL)
    for line in block.splitlines()
}
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run and a photograph, named as on the page."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "tests" / "fixtures" / "before_rooms" / "zero3", folder / "runs" / "small_images")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def test_the_page_has_an_example_of_each_format():
    assert sorted(COMMANDS) == ["onnx", "safetensors", "timm", "transformers"] and len(EXAMPLES) == 5
    assert all(1 <= len(example.splitlines()) <= 11 for example in EXAMPLES)


@pytest.mark.parametrize(
    "form, printed",
    [
        ("transformers", "torch.Size([1, 16])\n"),
        ("timm", "torch.Size([1, 16]) torch.Size([1, 16, 16]) 2\n"),
        pytest.param("onnx", "(2, 16) (2, 16, 16)\n", marks=pytest.mark.slow),  # its exporter takes ten seconds
        (
            "safetensors",
            "('target', 'context', 'predictor')\ntorch.Size([2, 16, 16]) ViTSize(width=16, depth=1, heads=2",
        ),
    ],
)
def test_a_format_is_exported_and_used_as_the_page_says(place, monkeypatch, capsys, form, printed):
    monkeypatch.chdir(place)
    command = COMMANDS[form]
    assert command[:2] == ["python", "launch/export.py"] and main(command[2:]) == 0
    said = capsys.readouterr().out
    if form == "transformers":  # the output that the page shows
        assert re.findall(r"```\n(target: .*?)```", PAGE, re.DOTALL) == [said]
    used = [line for line in said.splitlines() if line.startswith("next: ")]
    assert len(used) == 1 and f"exported/{form}" in used[0]
    (example,) = [text for text in EXAMPLES[:4] if f"exported/{form}" in text]
    exec(compile(example, form, "exec"), {})
    assert printed in capsys.readouterr().out


def test_the_example_of_loading(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    main(COMMANDS["timm"][2:])
    capsys.readouterr()
    exec(compile(EXAMPLES[4], "load", "exec"), {})
    assert capsys.readouterr().out.startswith("target 16 4 exported/timm holds the target encoder alone")
