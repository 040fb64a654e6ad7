from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest

from ijepa_scale.build import build_eval_images
from ijepa_scale.config import load_config
from ijepa_scale.data.images import open_images
from ijepa_scale.evals.evaluation import Labelled
from ijepa_scale.evals.labels import held_out_places, label_column, labelled_pair, open_splits, some_of
from ijepa_scale.pictures.subject import Checkpoint, open_images_of
from tests.data.small_sources import encoded, write_images, write_parquet


def splits(root, train, test=None):
    """open_splits() of a source with these columns, and what it says. test: those of its validation split."""
    for name, columns in (("train", train), ("validation", test)):
        if columns is not None:
            write_parquet(root / f"set/{name}.parquet", range(len(next(iter(columns.values())))), **columns)
    said = []
    return open_splits(str(root / "set"), "", "train", "", say=said.append, cache_dir=str(root / "cache")), said


def classes_of(labelled):
    """Name of each image's class, by the image's number."""
    return dict(zip(labelled.indices.tolist(), [labelled.names[label] for label in labelled.labels], strict=True))


def test_classes_have_one_number_in_both_splits_whatever_their_folders(tmp_path):
    """The test split has them in another order, lacks one and has one more."""
    for split, names in (("train", ["ant", "bee", "cat", "dog"]), ("test", ["aardvark", "cat", "bee", "dog"])):
        for name in names:
            write_images(tmp_path / split / name, range(2))
    train, test = (open_images(str(tmp_path), split=split) for split in ("train", "test"))
    fit, judged = labelled_pair(train, test, "label")
    assert fit.names is judged.names and len(fit) == 8 and len(judged) == 8
    assert set(classes_of(fit).values()) == {"ant", "bee", "cat", "dog"}
    for labelled in (fit, judged):
        for index, name in classes_of(labelled).items():
            assert f"/{name}/" in labelled.images.sample_id(index)


@pytest.mark.parametrize(
    "train, test",
    [
        ([7, None, 3, 7, 12, 3], [12, 3, None, 99]),
        (["oak", None, "ash", "oak", "yew", "ash"], ["yew", "ash", None, "fir"]),
        ([True, None, False, True, True, False], [False, True, None, True]),
    ],
    ids=["integers", "words", "booleans"],
)
def test_whole_numbers_and_words_are_classes_and_null_is_none(tmp_path, train, test):
    (first, second), said = splits(tmp_path, {"kind": pa.array(train)}, {"kind": pa.array(test)})
    fit, judged = labelled_pair(first, second, "kind")
    assert said == []
    for labelled, values in ((fit, train), (judged, test)):
        expected = {place: str(value) for place, value in enumerate(values) if value is not None}
        assert classes_of(labelled) == expected and labelled.labels.dtype == np.int64
    assert fit.names is judged.names and len(set(fit.names)) == len(fit.names)


def test_class_labels_keep_their_names_and_number(tmp_path):
    """Of another order in the other split."""
    saved = {}
    for split, names in (("train", ["cow", "ant", "never"]), ("validation", ["ant", "cow"])):
        features = datasets.Features({"image": datasets.Image(), "breed": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(4)], "breed": [0, 1, None, 0]}
        saved[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(saved).save_to_disk(tmp_path)
    train, test = (open_images(str(tmp_path), split=split) for split in saved)
    fit, judged = labelled_pair(train, test, label_column(train, ""))
    assert fit.names == ["cow", "ant", "never"] and fit.labels.tolist() == [0, 1, 0]
    assert classes_of(judged) == {0: "ant", 1: "cow", 3: "ant"}


def test_of_a_single_split_every_fifth_image_of_a_class_is_held_out(tmp_path):
    kinds = ["a"] * 12 + ["b"] * 5 + [None] * 4 + ["c"] * 4 + ["a", "b"] * 6
    kinds = [kinds[place] for place in np.random.default_rng(0).permutation(len(kinds))]
    (train, test), said = splits(tmp_path, {"kind": pa.array(kinds)})
    assert train is test and len(said) == 1
    assert "train is the only split: every fifth image of a class is for testing; or give --test-data" in said[0]
    fit, judged = labelled_pair(train, test, "kind")
    expected = []
    for kind in ("a", "b", "c"):
        expected += [place for place, own in enumerate(kinds) if own == kind][4::5]
    assert judged.indices.tolist() == sorted(expected) and len(expected) == 18 // 5 + 11 // 5 + 0
    labelled = [place for place, own in enumerate(kinds) if own]
    assert sorted([*fit.indices, *judged.indices]) == labelled and fit.indices.tolist() == sorted(fit.indices)
    for part in (fit, judged):
        assert classes_of(part) == {place: kinds[place] for place in part.indices.tolist()}


def test_of_a_single_split_several_labels_can_share_what_is_held_out(tmp_path):
    draw = np.random.default_rng(0)
    kinds, sizes = (draw.choice(values, 60).tolist() for values in (["a", "b"], ["s", "m", "l", None]))
    (train, test), _ = splits(tmp_path, {"kind": pa.array(kinds), "size": pa.array(sizes)})
    fit, judged = labelled_pair(train, test, "kind")
    others = labelled_pair(train, test, "size", held_out=judged.indices)
    for part, other in zip((fit, judged), others, strict=True):
        assert other.indices.tolist() == [place for place in part.indices.tolist() if sizes[place]]
        assert classes_of(other) == {place: sizes[place] for place in other.indices.tolist()}


def test_places_held_out_of_labels_without_any():
    assert held_out_places(np.full(9, -1)).tolist() == []
    assert held_out_places(np.array([5, -1, 5, 5, 5, -1, 5, 5])).tolist() == [6]


def test_the_test_split_is_the_one_that_is_usual_or_asked_for(tmp_path):
    for name in ("train", "test", "validation"):
        write_images(tmp_path / name / "a", range(2))

    def opened(split="train", test_split="", test_source="", source=tmp_path):
        pair = open_splits(str(source), str(test_source or ""), split, test_split, say=print)
        return [images.name.rpartition("/")[2] for images in pair]

    assert opened() == [f"{tmp_path.name}:train", f"{tmp_path.name}:validation"]
    assert opened(test_split="test") == [f"{tmp_path.name}:train", f"{tmp_path.name}:test"]
    assert opened(split="validation") == [f"{tmp_path.name}:validation", f"{tmp_path.name}:test"]
    other = tmp_path / "other"
    write_images(other / "train" / "a", range(3))
    assert opened(test_source=other) == [f"{tmp_path.name}:train", "other:train"]
    write_images(other / "test" / "a", range(3))
    assert opened(test_source=other) == [f"{tmp_path.name}:train", "other:test"]
    assert opened(test_source=other, test_split="train") == [f"{tmp_path.name}:train", "other:train"]


@pytest.mark.parametrize(
    "others, taken",
    [
        *[([name], name) for name in ("valid", "val", "dev", "test", "testing", "eval", "evaluation")],
        (["evaluation", "test", "dev"], "dev"),
        (["testing", "extra"], "testing"),
        (["extra"], ""),
    ],
)
def test_a_split_to_judge_by_is_found_by_any_of_its_names(tmp_path, others, taken):
    """For evaluate, for a run's probes, and for pictures."""
    source = str(tmp_path / "set")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(2)], "label": [0, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(dict.fromkeys(["train", *others], part)).save_to_disk(source)
    assert open_splits(source, "", "train", "", say=lambda text: None)[1].split == (taken or "train")
    config = load_config("tiny", [f"data.source={source}", "model.patch_size=4"])
    evaluation = build_eval_images(config)
    assert (evaluation.test.split, evaluation.held_out) == (taken or "train", bool(taken))
    checkpoint = Checkpoint(None, SimpleNamespace(image_size=8), None)
    assert open_images_of(checkpoint, source, "", "", among=2, seed=0).source.split == (taken or "train")


@pytest.mark.parametrize(
    "split, test_split, message",
    [
        ("train", "train", "--split and --test-split are both 'train'; .*has: .*train"),
        ("validation", "validation", "are both 'validation'; .*has: .*validation"),
        ("trane", "", "trane.*train.*validation"),
        ("train", "tset", "tset.*train.*validation"),
    ],
)
def test_wrong_splits_are_listed(tmp_path, split, test_split, message):
    for name in ("train", "validation"):
        write_images(tmp_path / name / "a", range(2))
    with pytest.raises(ValueError, match=message):
        open_splits(str(tmp_path), "", split, test_split, say=print)


def test_one_split_cannot_be_judged_by_itself(tmp_path):
    write_images(tmp_path / "train" / "a", range(2))
    with pytest.raises(ValueError, match="are both 'train'"):
        open_splits(str(tmp_path), "", "train", "train", say=print)


COLUMNS = {
    "size": pa.array([0.5, 1.5, 2.5, 3.5]),
    "breed": pa.array(["a", "b", "a", "b"]),
    "one": pa.array([4, 4, 4, 4]),
    "none": pa.array([None] * 4, pa.string()),
}


def test_the_column_of_classes_that_is_meant(tmp_path):
    (train, _), _ = splits(tmp_path / "a", {"breed": COLUMNS["breed"], "label": pa.array([0, 1, 0, 1])})
    assert label_column(train, "") == "label" and label_column(train, "breed") == "breed"
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.ClassLabel(names=["x", "y"]) for name in ("fine", "coarse")}}
    )
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(2)], "fine": [0, 1], "coarse": [1, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "b")
    several = open_images(str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"several columns of classes, fine, coarse: give --label COLUMN; .* fine \("):
        label_column(several, "")
    assert label_column(several, "coarse") == "coarse"
    (plain, _), _ = splits(tmp_path / "c", COLUMNS)
    message = r"has no column of classes: give --label COLUMN; its columns are: size \(.*breed \(string\), one \("
    with pytest.raises(ValueError, match=message):
        label_column(plain, "")
    write_images(tmp_path / "d" / "train", range(2))
    with pytest.raises(ValueError, match="its columns are: none but the images"):
        label_column(open_images(str(tmp_path / "d")), "")


@pytest.mark.parametrize(
    "column, message",
    [
        ("bred", r"has no column 'bred'; it has: size \(.*breed \(string\)"),
        ("size", r"'size' of .* is of double; classes are whole numbers or words"),
        ("one", "all labelled images of .* are of one class of one, 4: there is nothing to tell apart"),
        ("none", "no image of .* has a none; give another split, or --label COLUMN"),
    ],
)
def test_columns_that_nothing_can_be_learned_from(tmp_path, column, message):
    (train, test), _ = splits(tmp_path, COLUMNS, COLUMNS)
    with pytest.raises(ValueError, match=message):
        labelled_pair(train, test, column)


def test_splits_without_a_common_class(tmp_path):
    (train, test), _ = splits(tmp_path, {"kind": pa.array(["a", "b"])}, {"kind": pa.array(["c", "d"])})
    message = "no image of .*validation is of a class of kind that .*train has: .* by their names, here a, b, c"
    with pytest.raises(ValueError, match=message):
        labelled_pair(train, test, "kind")


def test_some_of_the_images_are_even_over_the_classes_and_always_the_same(tmp_path):
    labels = np.repeat(np.arange(4), [50, 40, 3, 7])
    images = Labelled(None, np.arange(100) * 10, labels, list("abcd"))
    few, more = some_of(images, 20, seed=1), some_of(images, 60, seed=1)
    assert np.bincount(few.labels).tolist() in ([6, 6, 3, 5], [6, 5, 3, 6], [5, 6, 3, 6])
    assert np.bincount(more.labels).tolist() == [25, 25, 3, 7]
    assert set(few.indices) < set(more.indices) < set(images.indices)
    assert np.array_equal(few.labels, labels[few.indices // 10])
    assert np.array_equal(few.indices, some_of(images, 20, seed=1).indices)
    assert not np.array_equal(few.indices, some_of(images, 20, seed=2).indices)
    assert some_of(images, 0, seed=1) is images is some_of(images, 100, seed=1)
