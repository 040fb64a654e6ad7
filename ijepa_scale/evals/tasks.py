"""What `evaluate` can ask of an encoder, by name, and which images each task is about."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ijepa_scale.data.images import ImageSet
from ijepa_scale.evals import clevr
from ijepa_scale.evals.attentive import AttentiveSettings, attentive, check_attentive
from ijepa_scale.evals.evaluation import Evaluation, Labelled, Outcome
from ijepa_scale.evals.finetune import check_finetune, finetune, recipe
from ijepa_scale.evals.knn import KnnSettings, knn
from ijepa_scale.evals.labels import checked_pair, label_column, labelled_pair
from ijepa_scale.evals.linear import FULL_SIZE, RECIPES, LinearSettings, check_linear, linear
from ijepa_scale.evals.logistic import LogisticSettings, logistic
from ijepa_scale.evals.lowshot import LowshotSettings, lowshot

COUNT, DISTANCE, DISTANCE_VALUE = "count", "distance", "nearest_distance"  # columns, as of the rendered scenes


@dataclass(frozen=True)
class Task:
    """usual: settings, one of which defaults() takes for an evaluation. column: of classes; "": that of labels.

    check: raises ValueError, before anything is computed, for settings that cannot be here: too few images, no package.
    """

    usual: tuple[Any, ...]
    run: Callable[[Evaluation, Any], Outcome]
    column: str = ""
    choose: Callable[[Evaluation], Any] | None = None
    check: Callable[[Evaluation, Any], None] = lambda evaluation, settings: None

    def defaults(self, evaluation: Evaluation) -> Any:
        return self.choose(evaluation) if self.choose else self.usual[0]


def linear_defaults(evaluation: Evaluation) -> LinearSettings:
    """ImageNet's recipe for as many images as it has, else VISSL's for smaller data sets."""
    return RECIPES["imagenet" if len(evaluation.train) >= FULL_SIZE else "transfer"]


TASKS: dict[str, Task] = {
    "knn": Task((KnnSettings(),), knn),
    "linear": Task(tuple(RECIPES.values()), linear, choose=linear_defaults, check=check_linear),
    "logistic": Task((LogisticSettings(),), logistic),
    "lowshot": Task((LowshotSettings(),), lowshot),
    "attentive": Task((AttentiveSettings(),), attentive, check=check_attentive),
    "finetune": Task(
        tuple(recipe(width, few_labels=False) for width in (768, 1280)),
        finetune,
        choose=lambda of: recipe(of.encoder.size.width, few_labels=False),
        check=check_finetune,
    ),
    "count": Task((clevr.COUNT,), clevr.count, COUNT),
    "distance": Task((clevr.DISTANCE,), clevr.distance, DISTANCE),
}


def settled(name: str, train: ImageSet, test: ImageSet, label: str) -> tuple[Labelled, Labelled, Callable]:
    """The labelled images that a task is about, and what runs it on them.

    label: the column of classes that the user gave, or "". test: may be train; then a fifth of it is held out.
    Raises ValueError where the source does not have what the task needs, with the columns that it has.
    """
    task = TASKS[name]
    if name != "distance":
        return *labelled_pair(train, test, label_column(train, label or task.column)), task.run
    types, values = train.column_types(), None
    numbers = DISTANCE_VALUE if DISTANCE_VALUE in types else ""
    column = label or (DISTANCE if DISTANCE in types or not numbers else numbers)
    if column == numbers or types.get(column, "").startswith(("float", "double")):
        values = train.numbers(column), test.numbers(column)
        classes = [clevr.distance_classes(of_all) for of_all in values]
        edges = [f"{edge:g}" for edge in clevr.DISTANCE_EDGES]
        names = [f"to {edges[0]}", *map(" to ".join, itertools.pairwise(edges)), f"over {edges[-1]}"]
        pair = checked_pair(train, classes[0], test, classes[1], names, column)
    else:
        pair = labelled_pair(train, test, column)
        if numbers:
            values = train.numbers(numbers), test.numbers(numbers)
    return *pair, functools.partial(clevr.distance, values=values)


def askable(train: ImageSet, test: ImageSet, label: str) -> tuple[list[str], dict[str, str]]:
    """The tasks that a source's columns allow, and why not the others. label: of those without an own column."""
    names, reasons = [], {}
    for name, task in TASKS.items():
        try:
            settled(name, train, test, "" if task.column else label)
            names.append(name)
        except ValueError as error:
            reasons[name] = str(error)
    return names, reasons
