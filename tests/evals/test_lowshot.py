import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ijepa_scale.evals.lowshot import LowshotSettings, drawn_places, lowshot
from tests.evals.small import evaluation_of, write_splits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("images"), noise=120)


def settings(*labels, **options):
    return LowshotSettings(labels=labels, l2=(0.01,), **options)


@pytest.fixture(scope="module")
def imagenet():
    """Labels of as many images as ImageNet-1k has, in a mixed order, classes as uneven as its own: (1281167,)."""
    rng = np.random.default_rng(0)
    sizes = np.full(1000, 1300)  # as of 895 classes
    sizes[rng.permutation(1000)[:105]] = rng.integers(732, 1300, 105)
    sizes[np.argmin(sizes)] = 732
    while off := sizes.sum() - 1_281_167:
        place = rng.integers(1000)
        step = int(np.clip(off, -50, 50))
        if sizes[place] > 732 and 732 < sizes[place] - step <= 1300:
            sizes[place] -= step
    assert (sizes.min(), sizes.max(), sizes.sum()) == (732, 1300, 1_281_167)
    return rng.permutation(np.repeat(np.arange(1000), sizes))


def test_one_percent_of_imagenet_has_12_or_13_labels_a_class(imagenet):
    places = drawn_places(imagenet, "1%", 0)
    assert len(places) == len(np.unique(places)) == 12_811  # 1% of 1,281,167, as SimCLR's list has
    counts = np.bincount(imagenet[places], minlength=1000)
    assert set(counts.tolist()) == {12, 13} and (counts == 13).sum() == 811
    assert np.array_equal(places, np.sort(places))
    tenth = drawn_places(imagenet, "10%", 0)
    assert len(tenth) == 128_116 and np.isin(places, tenth).all()
    assert set(np.bincount(imagenet[tenth]).tolist()) == {128, 129}
    assert np.array_equal(places, drawn_places(imagenet, "1%", 0))
    other = drawn_places(imagenet, "1%", 1)
    assert len(other) == 12_811 and len(np.intersect1d(other, places)) < 400  # 128 are expected by chance
    assert not np.array_equal(np.bincount(imagenet[other]), counts)  # which classes have one more is drawn, too


def test_images_are_drawn_from_all_over_a_class():
    labels = np.zeros(1000, dtype=np.int64)
    places = np.concatenate([drawn_places(labels, "100", seed) for seed in range(20)])
    assert 450 < places.mean() < 550 and len(np.unique(places)) > 800


@pytest.mark.parametrize(
    "text, counts",
    [
        ("2", [2, 2, 1]),  # a class that has fewer gives all
        ("1%", [1, 1, 1]),  # each has one at least
        ("49%", [24, 24, 1]),
        ("80%", [41, 39, 1]),
        ("100%", [62, 39, 1]),
    ],
)
def test_numbers_of_labels_in_uneven_classes(text, counts):
    labels = np.random.default_rng(0).permutation(np.repeat([7, 1, 4], [62, 39, 1]))
    assert np.bincount(labels[drawn_places(labels, text, 3)])[[7, 1, 4]].tolist() == counts


def test_a_smaller_share_is_part_of_a_larger_also_of_uneven_classes():
    labels = np.repeat(np.arange(6), [100, 3, 9, 40, 1, 47])
    draws = [set(drawn_places(labels, f"{percent}%", 1).tolist()) for percent in range(1, 101)]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(draws))
    assert [len(draw) for draw in draws] == [max(6, 2 * percent) for percent in range(1, 101)]


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "1.5", "few", "%", ""])
def test_numbers_of_labels_that_are_none(text):
    with pytest.raises(ValueError, match=r"labels must be a percentage such as 1%, or a number .* got '"):
        LowshotSettings(labels=(text,))


def test_the_file_that_is_written_gives_the_same_accuracy_again(root, tmp_path):
    evaluation = evaluation_of(root, out=tmp_path)
    outcome = lowshot(evaluation, settings("1", "25%"))
    assert [measure.settings["images"] for measure in outcome.measures] == [4, 10]
    assert [measure.name for measure in outcome.measures] == ["1 a class, linear", "25%, linear"]
    assert sum(measure.chosen for measure in outcome.measures) == 1
    files = [tmp_path / "lowshot-1-seed0.txt", tmp_path / "lowshot-25percent-seed0.txt"]
    lines = [path.read_text().splitlines() for path in files]
    assert [len(names) for names in lines] == [4, 10] and set(lines[0]) <= set(lines[1])
    assert {name.split("/")[-2] for name in lines[0]} == {f"class-{i}" for i in range(4)}
    for path, measure in zip(files, outcome.measures, strict=True):
        again = lowshot(replace(evaluation, seed=5), settings(subset=str(path)))
        assert [one.value for one in again.measures] == [measure.value] and again.measures[0].chosen
        assert again.measures[0].settings["images"] == measure.settings["images"]
    others = [lowshot(replace(evaluation, seed=seed), settings("1")).measures[0].value for seed in range(1, 5)]
    assert len({*others, outcome.measures[0].value}) > 1  # so that the equality above is of the subset, not of the task


def test_lists_of_base_names_as_simclrs(root, tmp_path):
    """In whatever order, with empty lines."""
    evaluation = evaluation_of(root, out=tmp_path)
    names = [evaluation.train.images.sample_id(index).rpartition("/")[2] for index in (30, 3, 17, 12, 25)]
    listed = tmp_path / "1percent.txt"
    listed.write_text("\n".join(names[:3]) + "\n\n" + "\r\n".join(names[3:]))
    outcome = lowshot(evaluation, settings(subset=str(listed)))
    assert outcome.measures[0].name == "those of 1percent.txt, linear" and outcome.measures[0].settings["images"] == 5
    listed.write_text(listed.read_text() + "\nn01440764_10026.JPEG\n")
    message = r"1percent.txt names 1 images that .* does not have with a label, such as n01440764_10026.JPEG; "
    with pytest.raises(ValueError, match=message):
        lowshot(evaluation, settings(subset=str(listed)))


def test_a_subset_that_is_not_there_or_of_one_class_or_empty(root, tmp_path):
    evaluation, path = evaluation_of(root, out=tmp_path), tmp_path / "subset.txt"
    with pytest.raises(ValueError, match=r"subset=.*subset\.txt is no file; give one with the name of an image a line"):
        lowshot(evaluation, settings(subset=str(path)))
    assert len(set(evaluation.train.labels[:4].tolist())) == 1
    for count in (4, 0):
        path.write_text("".join(f"{evaluation.train.images.sample_id(index)}\n" for index in range(count)))
        with pytest.raises(ValueError, match=f"names {count} images, of fewer than two classes"):
            lowshot(evaluation, settings(subset=str(path)))


def test_a_base_name_that_two_images_have_does_not_say_which(tmp_path):
    write_splits(tmp_path)
    copy = tmp_path / "train/class-1/000.png"
    shutil.copy(tmp_path / "train/class-0/000.png", copy)
    evaluation, path = evaluation_of(tmp_path), tmp_path / "subset.txt"
    path.write_text("000.png\n001.png\n")
    with pytest.raises(
        ValueError, match=r"names 000\.png, which several images are called: .*class-0/000.* and .*class-1"
    ):
        lowshot(evaluation, settings(subset=str(path)))
    path.write_text(f"{copy}\n004.png\n")  # but a whole name does
    assert lowshot(evaluation, settings(subset=str(path))).measures[0].settings["images"] == 2
