import pytest
import yaml

from ijepa_scale.data.images import open_images, splits_of
from ijepa_scale.data.sources.clones import clone_builder
from ijepa_scale.data.sources.inspection import inspect_source
from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.streams.opening import open_shards, shard_locations
from tests.data.small_sources import count_images, write_parquet

TRAIN, TEST = 30, 10  # rows by the card


def write_card(root, *, rows, files, listed=False):
    head = {}
    if rows:
        splits = [{"name": "train", "num_examples": TRAIN}, {"name": "test", "num_examples": TEST}]
        info = {"dataset_size": 9000, "splits": splits}
        head["dataset_info"] = [{"config_name": "default", **info}] if listed else info
    if files:
        files = [{"split": split, "path": f"data/{split}-*"} for split in ("train", "test")]
        head["configs"] = [{"config_name": "default", "data_files": files}]
    (root / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n# Data\n")


def write_clone(root, train, test, **card):
    for split, count in (("train", train), ("test", test)):
        for shard, first in enumerate(range(0, count, 15)):
            numbers = range(first, min(first + 15, count))
            write_parquet(root / f"data/{split}-{shard:05}-of-00002.parquet", numbers)
    write_card(root, **card)
    return str(root)


@pytest.mark.parametrize("rows, files, listed", [(True, True, False), (True, False, True), (False, True, False)])
def test_a_data_set_of_which_a_part_is_there_is_read_and_the_rest_told(tmp_path, caplog, rows, files, listed):
    for number, (train, test) in enumerate([(TRAIN, TEST), (15, TEST), (15, 0), (0, 4)]):
        caplog.clear()
        source = write_clone(tmp_path / str(number), train, test, rows=rows, files=files, listed=listed)
        here = {split: count for split, count in (("train", train), ("test", test)) if count}
        assert set(splits_of(source)) == set(shard_locations(source)) == set(here)
        for split, count in here.items():
            assert len(open_images(source, split=split)) == count_images(source, split=split) == count
            assert open_shards(source, split=split, patience=Patience(0)).num_images == count
        lacking = [f"{train:,} rows of {TRAIN} of train"] * (train < TRAIN)
        lacking += [f"{test:,} rows of {TEST} of test"] * (test < TEST)
        absent = ", ".join(split for split, count in (("train", train), ("test", test)) if not count)
        assert caplog.text.count(f"tells: it holds {', '.join(lacking)}; what is there") == bool(rows and lacking)
        assert caplog.text.count(f"files of {absent}, which README.md tells of, are not") == bool(files and absent)


def test_parquet_in_no_split_is_told(tmp_path, caplog):
    write_parquet(tmp_path / "train-0.parquet", range(3))
    write_parquet(tmp_path / "more.parquet", range(2))
    assert len(open_images(str(tmp_path))) == 3
    assert "left out: 1 of the Parquet files, in no split by their names or README.md, such as more" in caplog.text


def test_files_of_other_kinds_do_not_change_what_is_parquet(tmp_path):
    """`datasets` takes the kind of which there are the most files, and refuses splits of several kinds."""
    write_parquet(tmp_path / "train/x.parquet", range(3))
    write_parquet(tmp_path / "val/x.parquet", range(2))
    for folder in ("train", "val"):
        for i in range(5):
            (tmp_path / folder / f"{i}.json").write_text("{}")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/notes.csv").write_text("a,b\n1,2\n")
    assert set(splits_of(str(tmp_path))) == {"train", "validation"}
    assert [len(open_images(str(tmp_path), split=split)) for split in ("train", "val")] == [3, 2]


def test_of_several_configurations_none_is_guessed(tmp_path):
    for name in ("red", "blue"):
        write_parquet(tmp_path / name / "x.parquet", range(3 if name == "red" else 4))
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in ("red", "blue")]
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    with pytest.raises(ValueError, match=r"(?s)[Cc]onfig.*blue"):
        open_images(str(tmp_path))
    for config in configs:
        config["data_files"] = [{"split": "train", "path": f"{config['config_name']}/*"}]
    configs[1]["data_files"].append({"split": "test", "path": "none/*"})
    configs[1]["default"] = True
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    assert len(open_images(str(tmp_path))) == 4
    files = inspect_source(str(tmp_path))[1]
    builder = clone_builder(str(tmp_path), files, None, "red")
    assert [str(file) for file in builder.config.data_files["train"]] == [str(tmp_path / "red/x.parquet")]
