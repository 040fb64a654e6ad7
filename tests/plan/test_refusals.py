"""--dry-run refuses what a run refuses, in the same words."""

import io
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ijepa_scale.config import load_config
from ijepa_scale.engine import zero
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.plan.dry_run import dry_run
from ijepa_scale.run.setup import check, set_up
from tests.conftest import SMALL_CONFIG
from tests.data.small_sources import IMAGE, save_to_disk, write_images, write_parquet, write_tar

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
STREAM, ENDLESS, LARGE = "data.streaming=true", "optimization.max_steps=0", "optimization.global_batch_size=48"


def files(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def junk(root, count=20, ending="png"):
    files(root, {f"{i}.{ending}": b"no image" for i in range(count)})


def junk_parquet(root):
    rows = [{"bytes": b"no image", "path": f"{i}.png"} for i in range(20)]
    (root / "data").mkdir()
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), root / "data/train-0.parquet")


def no_column(root):
    pq.write_table(pa.table({"url": ["x"] * 20, "size": [1] * 20}), root / "x.parquet")


def cut(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def damaged_arrow(root):
    save_to_disk(root / "saved", range(20), shards=1)
    (root / "saved/data-00000-of-00001.arrow").rename(root / "x.arrow")
    cut(root / "x.arrow", 0.5)
    for file in (root / "saved").iterdir():
        file.unlink()


def damaged_tar(root):
    files(root, {"x.tar": b"\xff" * 4096})


def damaged_parquet(root):
    cut(write_parquet(root / "x.parquet", range(20)), 0.9)


def bad_validation(root):
    write_images(root / "train", range(20))
    junk(root / "val")


def bad_validation_parquet(root):
    write_parquet(root / "train-0.parquet", range(20))
    write_parquet(root / "validation-0.parquet", range(0))


def two_tables(root):
    files(root, {"a.csv": b"path\nx.png\n", "b.csv": b"path\ny.png\n"})


def long_tar(root):
    with tarfile.open(root / "x.tar", "w") as tar:
        info = tarfile.TarInfo("notes.txt")
        tar.addfile(info, io.BytesIO())


def good(root):
    write_images(root, range(20))


def good_parquet(root):
    write_parquet(root / "x.parquet", range(20))


CASES = {
    "no folder": (lambda root: root.rmdir(), []),
    "an empty folder": (lambda root: None, []),
    "other files": (lambda root: files(root, {"a.zip": b"x", "b.heic": b"x"}), []),
    "pointers": (lambda root: files(root, {"a.png": POINTER}), []),
    "pointers, Parquet": (lambda root: files(root, {"a.parquet": POINTER}), []),
    "two kinds": (lambda root: (write_images(root / "a", range(20)), write_tar(root / "b.tar", range(20))), []),
    "two tables": (two_tables, []),
    "one image": (good, ["data.source=ROOT/0000.png"]),
    "another storage": (good, ["data.source=s3://bucket/x"]),
    "no split": (good, ["data.split=test"]),
    "no split, Parquet": (good_parquet, ["data.split=test"]),
    "no split for the report": (good, ["data.eval_split=test"]),
    "no split for the report, Parquet": (good_parquet, ["data.eval_split=test"]),
    "no split for the report, streamed": (good_parquet, ["data.eval_split=test", STREAM]),
    "few images": (lambda root: write_images(root, range(7)), []),
    "few images, Parquet": (lambda root: write_parquet(root / "x.parquet", range(7)), []),
    "few images, streamed": (lambda root: write_images(root, range(7)), [STREAM]),
    "few images, saved": (lambda root: save_to_disk(root, range(7)), []),
    "few images, mixed": (good, ["data.source=[{path: ROOT}, {path: ROOT/, weight: 3}]", LARGE]),
    "bad images": (junk, []),
    "bad images, streamed": (junk, [STREAM]),
    "bad images, Parquet": (junk_parquet, []),
    "bad images, Parquet, streamed": (junk_parquet, [STREAM]),
    "bad images of the report": (bad_validation, ["report.train_images=8"]),
    "no images of the report, Parquet": (bad_validation_parquet, ["report.train_images=8"]),
    "small images": (good, ["model.patch_size=16"]),
    "small images, Parquet": (good_parquet, ["model.patch_size=16"]),
    "no column": (no_column, []),
    "no column, streamed": (no_column, [STREAM]),
    "no rows": (lambda root: write_parquet(root / "x.parquet", range(0)), []),
    "no rows, streamed": (lambda root: write_parquet(root / "x.parquet", range(0)), [STREAM]),
    "no rows, saved": (lambda root: save_to_disk(root, range(0), shards=1), []),
    "no images in a tar": (long_tar, []),
    "damaged Parquet": (damaged_parquet, []),
    "damaged Parquet, streamed": (damaged_parquet, [STREAM]),
    "damaged Arrow": (damaged_arrow, []),
    "damaged tar": (damaged_tar, []),
    "compressed tar": (lambda root: write_tar(root / "x.tar.gz", range(20), "w:gz"), []),
    "a stream of unknown length": (lambda root: write_tar(root / "x.tar", range(20)), [STREAM, ENDLESS]),
    "gaps": (lambda root: write_tar(root / "0.tar", range(20)), ["data.source=ROOT/{0..3}.tar", STREAM]),
    "URLs by index": (good, ["data.source=http://127.0.0.1:1/x.tar"]),
    "one of a mixture": (good, ["data.source=[{path: ROOT}, {path: ROOT/none}]"]),
    "an uneven batch": (good, ["optimization.micro_batch_size=3"]),
    "one image to compare": (good, ["optimization.micro_batch_size=1", "loss.variance=1.0"]),
    "DeepSpeed's settings": (good, ["engine.deepspeed={fp16: {enabled: true}}"]),
    "no blocks": (good, ["mask.min_keep=60"]),
    "no model": (good, ["model.name=vit_none"]),
}  # fmt: skip


def refusal(call):
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def not_refused(*arguments, **options):
    raise AssertionError("set up")


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, monkeypatch, name):
    make, overrides = CASES[name]
    root, cache, config_file = tmp_path / "set", tmp_path / "cache", tmp_path / "x.yaml"
    root.mkdir()
    make(root)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(zero, "building_context", not_refused)  # what comes after all checks
    config_file.write_text(SMALL_CONFIG % root)
    overrides = [f"run_dir={tmp_path}/run", *(text.replace("ROOT", str(root)) for text in overrides)]
    config = load_config(config_file, overrides)
    seen = refusal(lambda: dry_run(config))
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("cache/parquet"))
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    wanted = refusal(lambda: set_up(config, check(config), ranks, resume="auto", allow_changes=False))
    assert wanted is not None
    assert seen == wanted
