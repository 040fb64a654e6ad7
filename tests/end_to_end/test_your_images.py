"""Every command of docs/your_images.md, as it stands there, on generated pictures."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.processes import ENVIRONMENT, free_port

ROOT = Path(__file__).parents[2]
# The document's config at a size for a test.
SMALLER = [
    "model={name: vit_tiny, patch_size: 8, width: 32, depth: 2, heads: 2}",
    "predictor={width: 16, depth: 1}",
    "optimization.global_batch_size=16",
    "optimization.max_steps=4",
    "data.workers=0",
    "logging.health_images=32",
]


@pytest.mark.slow  # seven cold starts; what each does, quicker tests ask of it
def test_each_command_runs_and_leaves_what_the_text_says(image_folder, tmp_path):
    for name in ("launch", "ijepa_scale", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(image_folder / "train", tmp_path / "my_pictures")
    shutil.copy(image_folder / "train" / "class-0" / "000.png", tmp_path / "holiday.jpg")
    config = OmegaConf.merge(OmegaConf.load(ROOT / "configs" / "small_images.yaml"), OmegaConf.from_dotlist(SMALLER))
    (tmp_path / "configs").mkdir()
    OmegaConf.save(config, tmp_path / "configs" / "small_images.yaml")
    commands = re.findall(r"```bash\n(.*?)\n```", (ROOT / "docs" / "your_images.md").read_text(), re.DOTALL)
    assert len(commands) == 6
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    outputs = []
    for command in commands:
        words = command.split()
        if words[0] == "deepspeed":
            words[1:1] = ["--master_port", str(free_port())]  # the default one may be in use on the test's machine
        ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        outputs.append(ended.stdout)
    assert "images         64 in my_pictures:train" in outputs[0] and not re.search(r"\bstep 1/", outputs[0])
    assert "health at step 4" in outputs[1]
    made = ["runs/small_images/masks.png", "neighbours.png", "holiday_neighbours.png"]
    made += [f"my_embeddings/{name}" for name in ("embeddings.npy", "images.csv", "embeddings.json")]
    made += ["my_patches/embeddings.patches.npy"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    assert outputs[3].count(":\n") == 6
    assert outputs[4].startswith("holiday.jpg:\n  1.000  ") and "class-0/000.png" in outputs[4].splitlines()[1]
