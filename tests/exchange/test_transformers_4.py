"""Folders that transformers of version 4 reads and writes, in an environment of its own beside the tests' torch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.data.transforms import center_crop
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import load

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms"
# Without what they need: all of that but these three is of the tests' own environment.
PACKAGES = ("transformers<5", "huggingface_hub<1", "tokenizers<0.23")
ASKED = """\
import sys
import numpy, torch, transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

assert transformers.__version__.startswith("4.")
folder, saved, picture, arrays = sys.argv[1:]
model, said = AutoModel.from_pretrained(folder, output_loading_info=True)
assert not any(said.values()), said
processor = AutoImageProcessor.from_pretrained(folder)
assert type(processor).__name__.startswith("BitImageProcessor")
found = dict(numpy.load(arrays))
with torch.no_grad():
    found["theirs"] = model.eval()(torch.from_numpy(found["pixels"])).last_hidden_state.numpy()
    pixels = processor(Image.open(picture), return_tensors="pt")
    found["of_picture"] = model(**pixels).last_hidden_state.numpy()
numpy.savez(arrays, **found)
model.save_pretrained(saved)
"""


@pytest.fixture(scope="module")
def version_4(tmp_path_factory):
    """The folder of its packages, to be put first on the path."""
    folder = tmp_path_factory.mktemp("transformers_4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    try:
        installed = subprocess.run(pip, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        pytest.skip("transformers 4 cannot be installed: pip takes longer than 400 seconds")
    if installed.returncode:
        pytest.skip(f"transformers 4 cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow  # pip, and a cold start of transformers
@torch.no_grad()
def test_version_4_gives_our_features_and_its_folders_are_read(version_4, tmp_path):
    export(str(OLD / "zero3"), tmp_path / "exported", form="transformers")
    run = load(OLD / "zero3").network
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    np.savez(tmp_path / "arrays.npz", pixels=((images / 255 - mean) / std).numpy())
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((50, 40), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "picture.png")
    words = [tmp_path / name for name in ("exported", "saved", "picture.png", "arrays.npz")]
    environment = {**os.environ, "PYTHONPATH": str(version_4), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASKED, *map(str, words)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = {name: torch.from_numpy(values) for name, values in np.load(tmp_path / "arrays.npz").items()}
    torch.testing.assert_close(found["theirs"], run(images), rtol=0, atol=1e-5)
    ours = run(torch.from_numpy(center_crop(picture, 16))[None]).mean(1)
    assert torch.cosine_similarity(found["of_picture"].mean(1), ours) > 0.999
    again = load(tmp_path / "saved").network.state_dict()
    assert all(torch.equal(again[name], values) for name, values in run.state_dict().items())
