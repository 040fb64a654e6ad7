"""No file that is read runs code: what would is refused, or is an image that cannot be read."""

import ast
import contextlib
import hashlib
import io
import json
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ijepa_scale.config import load_config
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import open_images
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.opening import open_shards
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.distributed import alone
from ijepa_scale.evals import embed
from ijepa_scale.evals.features import FACTS, FEATURES, INDICES, _holding, _read
from ijepa_scale.exchange.load import load
from ijepa_scale.run.frozen import of_encoder
from ijepa_scale.run.init_from import check as check_init_from
from ijepa_scale.run.setup import check
from tests.data.small_sources import IMAGE, encoded, write_parquet

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms" / "zero1"
ROOT = Path(__file__).parents[2]


class Hostile:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    mark = tmp_path / "code-has-run"
    yield mark
    assert not mark.exists(), "a file has run code"


def test_the_hostile_object_works(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "x")))
    assert (tmp_path / "x").is_dir()


def torch_file(path: Path, mark: Path, old: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"epoch": 3, "target_encoder": {"pos_embed": torch.ones(1, 4, 8), "x": Hostile(mark)}}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def plain_pickle(path: Path, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Hostile(mark)))
    return path


def npy(path: Path, mark: Path) -> Path:
    np.save(path, np.array([[Hostile(mark)] * 2] * 2, dtype=object), allow_pickle=True)
    return path


def folder_of_transformers(folder: Path, mark: Path) -> Path:
    torch_file(folder / "pytorch_model.bin", mark)
    code = {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "ijepa", "architectures": ["X"], **code}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    return folder


def folder_of_timm(folder: Path, mark: Path) -> Path:
    torch_file(folder / "pytorch_model.bin", mark)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0}))
    return folder


def run_of_pickles(folder: Path, mark: Path, *, hashed: bool) -> Path:
    """A run whose checkpoint's files are pickles, and, hashed, whose manifest says so."""
    shutil.copytree(OLD, folder)
    for checkpoint in checkpoints.candidates(folder / "checkpoints"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for entry in manifest["files"]:
            content = plain_pickle(checkpoint / entry["name"], mark).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if hashed:
            manifest["sha256"] = checkpoints._digest(manifest)
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


WEIGHTS = {
    "of the reference": lambda folder, mark: torch_file(folder / "jepa-latest.pth.tar", mark),
    "of the reference, before torch 1.6": lambda folder, mark: torch_file(folder / "x.pth.tar", mark, old=True),
    "a .pt file": lambda folder, mark: torch_file(folder / "x.pt", mark),
    "a pickle": lambda folder, mark: plain_pickle(folder / "x.pth", mark),
    "a pickle that is called safetensors": lambda folder, mark: plain_pickle(folder / "model.safetensors", mark),
    "transformers": lambda folder, mark: folder_of_transformers(folder, mark),
    "timm": lambda folder, mark: folder_of_timm(folder, mark),
    "an array": lambda folder, mark: npy(folder / "x.npy", mark),
    "a run": lambda folder, mark: run_of_pickles(folder / "run", mark, hashed=False),
    "a run with its hashes": lambda folder, mark: run_of_pickles(folder / "run", mark, hashed=True),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_run_nothing(tmp_path, mark, kind):
    """Wherever they are read: by evaluate and export, as model.init_from, and under a sketch."""
    path = WEIGHTS[kind](tmp_path, mark)
    for network in ("target", "predictor"):
        with pytest.raises(ValueError) as refused:
            load(path, network)
        assert str(tmp_path) in str(refused.value)
    (tmp_path / "x.yaml").write_text("model: {name: vit_tiny, patch_size: 16}\ndata: {source: x}")
    config = load_config(tmp_path / "x.yaml", [f"model.init_from={path}"])
    with pytest.raises(ValueError):
        check_init_from(config, check(config))
    (tmp_path / "sketch.yaml").write_text(f"objective: {{name: sketch}}\nsketch: {{checkpoint: {path}}}")
    with pytest.raises(ValueError, match=r"sketch\.checkpoint"):
        of_encoder(load_config(tmp_path / "sketch.yaml"))


@pytest.mark.parametrize("hashed", [False, True])
def test_a_checkpoint_to_resume_from_runs_nothing(tmp_path, mark, hashed):
    folder = run_of_pickles(tmp_path / "run", mark, hashed=hashed) / "checkpoints"
    with pytest.raises(ValueError, match="step-"), contextlib.ExitStack() as files:
        found, _ = checkpoints.newest_good(folder, alone())
        assert found is not None and hashed
        checkpoints.file_index(found, files)


def test_features_and_embeddings_that_are_kept_run_nothing(tmp_path, mark):
    folder = tmp_path / "features" / "one"
    folder.mkdir(parents=True)
    for name in (INDICES, FEATURES, embed.EMBEDDINGS):
        npy(folder / name, mark)
    for name in (FACTS, embed.FACTS):
        (folder / name).write_text("{}")
    (folder / embed.IMAGES).write_text("row\n0\n1\n")
    calls = [lambda: _read(folder), lambda: _holding(folder.parent, np.arange(1))]
    for call in (*calls, lambda: embed.Embeddings.read(folder)):
        with pytest.raises(ValueError, match=r"is no whole .npy file of numbers "):
            call()


def tar_of(path: Path, mark: Path) -> str:
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            files = {"png": encoded(i), "pyd": pickle.dumps(Hostile(mark)), "cls": pickle.dumps(Hostile(mark))}
            files |= {"npy": npy(path.with_suffix(".npy"), mark).read_bytes(), "jpg": pickle.dumps(Hostile(mark))}
            files["pth"] = torch_file(path.with_suffix(".pth"), mark).read_bytes()
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{i:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def clone(folder: Path, mark: Path, card: str = "pretty_name: x") -> str:
    """As a data set of the Hub with code of its own."""
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train-0.parquet", range(4))
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in (f"{folder.name}.py", "dataset.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code)
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return str(folder)


def cells(path: Path, mark: Path) -> str:
    rows = [{"bytes": pickle.dumps(Hostile(mark)), "path": f"{i}.pkl"} for i in range(4)]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), path)
    return str(path)


def files(folder: Path, mark: Path) -> str:
    folder.mkdir()
    for i in range(4):
        plain_pickle(folder / f"{i}.png", mark)
    return str(folder)


SOURCES = {
    "tar": lambda root, mark: tar_of(root / "x.tar", mark),
    "a clone with code": lambda root, mark: clone(root / "clone", mark),
    "a card with code": lambda root, mark: clone(root / "x", mark, f"x: !!python/object/apply:os.mkdir ['{mark}']"),
    "Parquet": lambda root, mark: cells(root / "x.parquet", mark),
    "files": lambda root, mark: files(root / "set", mark),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_run_nothing(tmp_path, mark, monkeypatch, kind):
    """Mapped and streamed; their images are read, or cannot be."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = SOURCES[kind](tmp_path, mark)
    read = 0
    try:
        images = open_images(source, cache_dir=str(tmp_path / "cache"))
        for index in range(len(images)):
            try:
                images.read(index)
                read += 1
            except BadImageError:
                pass
    except ValueError as error:
        assert "\n" not in str(error)
    assert read == (4 if kind in ("tar", "a clone with code") else 0)
    try:
        shards = open_shards(source, cache_dir=str(tmp_path / "cache"), patience=Patience(0))
        assert shards.locations
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_a_config_runs_nothing(tmp_path, mark, tag):
    path = tmp_path / "x.yaml"
    path.write_text(f"run_dir: !!python/{tag} [{str(mark)!r}]\n")
    with pytest.raises(ValueError, match=r"x\.yaml"):
        load_config(path)
    path.write_text("")
    with pytest.raises(ValueError):
        load_config(path, [f"engine.deepspeed.x=!!python/{tag} [{str(mark)!r}]"])
    path.write_text("run_dir: ${oc.env:HOME}${eval:1}\n")
    with pytest.raises(ValueError, match="run_dir"):
        load_config(path)


# --- of the code itself

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"}
FORBIDDEN_CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_CALLS |= {"torch.hub.load", "torch.jit.load", "torch.export.load"}


def sources_of_the_package() -> list[Path]:
    return [path for room in ("ijepa_scale", "kernels", "launch") for path in sorted((ROOT / room).rglob("*.py"))]


def what_may_run_code(tree: ast.AST) -> list[str]:
    """Calls and imports by which a file that is read could run code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}

        def says(key: str, wanted: bool, given: dict = given) -> bool:
            return isinstance(given.get(key), ast.Constant) and given[key].value is wanted

        if name in FORBIDDEN_CALLS or "trust_remote_code" in given or says("shell", True):
            found.append(ast.unparse(node))
        if name == "torch.load" and not says("weights_only", True):
            found.append(ast.unparse(node))
        if name in ("np.load", "numpy.load") and not says("allow_pickle", False):
            found.append(ast.unparse(node))
        if says("allow_pickle", True) or says("weights_only", False):
            found.append(ast.unparse(node))
    return found


def test_the_package_reads_no_pickles():
    paths = sources_of_the_package()
    assert len(paths) > 200 and sys.path
    found = {str(path.relative_to(ROOT)): what_may_run_code(ast.parse(path.read_bytes())) for path in paths}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "yaml.load(f, Loader=L)", "eval(x)", "f(trust_remote_code=False)",
        "subprocess.run(x, shell=True)", "other.load(f, weights_only=False)",
    ],
)  # fmt: skip
def test_what_could_run_code_is_seen(line):
    assert what_may_run_code(ast.parse(line))
