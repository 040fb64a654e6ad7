"""Which images have which class: of two splits, or of one that is divided."""

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np

from ijepa_scale.data.images import ImageSet, check_images, open_images, splits_of
from ijepa_scale.data.order import generator_for
from ijepa_scale.data.sources.folders import judging_split
from ijepa_scale.evals.evaluation import Labelled

HELD_OUT_EVERY = 5  # of a class's images in a source without another split, this one is for testing
USUAL = ("label", "labels", "class")
SUBSET = 0x6C6F77  # the stream of random numbers that some of the images are drawn from


def open_splits(
    train_source: str,
    test_source: str,
    split: str,
    test_split: str,
    *,
    say: Callable[[str], None],
    **reading: Any,
) -> tuple[ImageSet, ImageSet]:
    """The images to fit on, and those to judge by: the same set where the source has one split alone, which is said.

    test_source: "": the same as train_source. test_split: "": its validation or test split. reading: the rest of
    open_images()'s arguments. Raises ValueError, which lists the splits, for one that is not there.
    """
    train = open_images(train_source, split=split, **reading)
    source, splits = test_source or train_source, splits_of(test_source or train_source, **reading)
    found = test_split or judging_split(splits, "" if test_source else train.split)
    if test_source:
        found = found or splits[0]  # also one that is called train: it is another source
    if not found:
        say(f"{train.name} is the only split: every fifth image of a class is for testing; or give --test-data")
        return train, train
    test = open_images(source, split=found, **reading)
    if not test_source and test.split == train.split:
        raise ValueError(f"--split and --test-split are both {test.split!r}; {source!r} has: {', '.join(splits)}")
    for images in (train, test):
        check_images(images, min_side=1)
    return train, test


def label_column(images: ImageSet, name: str) -> str:
    """The column of classes that is meant. name: that the user gave, or "": the only one, or the one called label.

    Raises ValueError, which lists the columns, where there is none or where several may be meant.
    """
    known = images.label_columns()
    if name or len(known) == 1:
        return name or next(iter(known))
    if usual := [column for column in known if column.lower() in USUAL]:
        return usual[0]
    types = ", ".join(f"{column} ({kind})" for column, kind in images.column_types().items())
    what = f"several columns of classes, {', '.join(known)}" if known else "no column of classes"
    raise ValueError(
        f"{images.name} has {what}: give --label COLUMN; its columns are: {types or 'none but the images'}"
    )


def labelled_pair(
    train: ImageSet, test: ImageSet, column: str, *, held_out: np.ndarray | None = None
) -> tuple[Labelled, Labelled]:
    """Labelled images to fit on and to judge by, their classes numbered alike, by their names.

    Where both are the same split, every fifth image of a class is for testing, or held_out: indices. Raises ValueError
    where there is no such column, or nothing can be learned from it.
    """
    of_train, of_test = train.classes(column), test.classes(column)
    names = list(dict.fromkeys([*of_train.names, *of_test.names]))
    number = {name: place for place, name in enumerate(names)}
    renumbered = np.array([number[name] for name in of_test.names] + [-1])  # and of -1 still -1
    labels, test_labels = of_train.values, renumbered[of_test.values]
    return checked_pair(train, labels, test, test_labels, names, column, held_out=held_out)


def checked_pair(
    train: ImageSet,
    labels: np.ndarray,
    test: ImageSet,
    test_labels: np.ndarray,
    names: list[str],
    column: str,
    *,
    held_out: np.ndarray | None = None,
) -> tuple[Labelled, Labelled]:
    """Those of the images that have a class; labels, test_labels: -1 where one has none. The rest as labelled_pair."""
    if test is train:
        held_out = held_out_places(labels) if held_out is None else held_out[labels[held_out] >= 0]
        fit = np.setdiff1d(np.flatnonzero(labels >= 0), held_out)
    else:
        fit, held_out = np.flatnonzero(labels >= 0), np.flatnonzero(test_labels >= 0)
    for images, places in ((train, fit), (test, held_out)):
        if not len(places):
            raise ValueError(f"no image of {images.name} has a {column}; give another split, or --label COLUMN")
    if len(np.unique(labels[fit])) < 2:
        raise ValueError(
            f"all labelled images of {train.name} are of one class of {column}, {names[labels[fit][0]]}: there is "
            "nothing to tell apart; give another split, or --label COLUMN"
        )
    pair = Labelled(train, fit, labels[fit], names), Labelled(test, held_out, test_labels[held_out], names)
    if not np.isin(pair[1].labels, pair[0].labels).any():
        raise ValueError(
            f"no image of {test.name} is of a class of {column} that {train.name} has: classes are told apart by "
            f"their names, here {', '.join(names[:3])}, ...; give splits of one data set"
        )
    return pair


def held_out_places(labels: np.ndarray) -> np.ndarray:
    """Places of every fifth image of each class, in order; labels: -1 where an image has none."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    place_in_class = np.arange(len(order)) - np.repeat(starts, sizes)
    return np.sort(order[place_in_class % HELD_OUT_EVERY == HELD_OUT_EVERY - 1])


def some_of(images: Labelled, count: int, seed: int) -> Labelled:
    """So many of the images, evenly over the classes, one of each at least; all for 0, or where there are no more."""
    return images.take(even_places(images.labels, seed, total=count)) if 0 < count < len(images) else images


def even_places(labels: np.ndarray, seed: int, *, total: int | None, each: int = 0) -> np.ndarray:
    """Places of so many images drawn evenly over the classes, ascending; a smaller draw is part of a larger.

    labels: (n,) int64. total: of all classes; some, drawn at random, have one more than others. None: each of a class.
    """
    order = np.argsort(labels, kind="stable")
    classes, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    if total is None:
        wanted = np.minimum(sizes, each)
    else:
        wanted = _even_shares(sizes, total, generator_for(seed, SUBSET).random(len(classes)))
    chosen = []
    for number, start, size, count in zip(classes, starts, sizes, wanted, strict=True):
        draws = generator_for(seed, SUBSET, int(number)).random(int(size))
        chosen.append(order[start + np.argsort(draws, kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def _even_shares(sizes: np.ndarray, total: int, draws: np.ndarray) -> np.ndarray:
    """How many of each class: so many of all, or all that a class has, and one more of those with the lowest draws."""
    level = bisect.bisect_right(range(1, sizes.max() + 1), total, key=lambda each: np.minimum(sizes, each).sum())
    wanted = np.minimum(sizes, level)
    larger = np.flatnonzero(sizes > level)
    wanted[larger[np.argsort(draws[larger], kind="stable")[: total - wanted.sum()]]] += 1
    return np.maximum(wanted, 1)
