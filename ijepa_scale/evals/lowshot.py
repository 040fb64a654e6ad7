"""Few labels a class: 1%, 10% or so many, drawn once and written down, to be given again."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ijepa_scale.data.files import write_whole
from ijepa_scale.evals.evaluation import Evaluation, Labelled, Measure, Outcome, accuracy, commonest_share
from ijepa_scale.evals.features import features_of
from ijepa_scale.evals.finetune import finetune, recipe
from ijepa_scale.evals.labels import even_places
from ijepa_scale.evals.logistic import STRENGTHS, check_strengths, logistic_predictions


@dataclass(frozen=True, kw_only=True)
class LowshotSettings:
    """Logistic regression of frozen features, and fine-tuning, with few labels (arXiv:2301.08243, section 4)."""

    labels: tuple[str, ...] = ("1%", "10%")  # of the training images, evenly over the classes, or a number a class
    subset: str = ""  # a file of names of images, a line each, to be used instead
    l2: tuple[float, ...] = STRENGTHS  # as of the task logistic
    finetune: bool = False  # the whole network as well, by the paper's recipe for few labels: much longer
    epochs: int = 50  # of that

    def __post_init__(self) -> None:
        check_strengths(self.l2)
        for text in self.labels:
            share_of_labels(text)


def lowshot(evaluation: Evaluation, settings: LowshotSettings) -> Outcome:
    """Accuracy with each number of labels, the best as the result. Subsets are written to evaluation.out."""
    test = features_of(evaluation, evaluation.test)
    measures: list[Measure] = []
    predicted: list[np.ndarray] = []
    for words, places in subsets(evaluation, settings):
        train = features_of(evaluation, evaluation.train.take(places))
        if evaluation.ranks.first:
            device = evaluation.ranks.device
            data = [tensor.to(device) for part in (train, test) for tensor in part.tensors()]
            answers, strength = logistic_predictions(*data, l2=settings.l2)
            facts = {"labels": words, "images": len(train.labels), "l2": strength}
            chance = commonest_share(test.labels)
            predicted.append(answers.cpu().numpy())
            measures.append(accuracy(f"{words}, linear", predicted[-1], test.labels, chance=chance, settings=facts))
        if settings.finetune:
            measure, found = _finetuned(evaluation, words, places, settings)
            measures.append(measure)
            predicted.append(found)
    return Outcome.best_of(measures, predicted, test.labels) if measures else Outcome(measures=[])


def _finetuned(
    evaluation: Evaluation, words: str, places: np.ndarray, settings: LowshotSettings
) -> tuple[Measure, np.ndarray]:
    """Fine-tuned on some of the training images; its weights go to a folder of their own."""
    part = evaluation.train.take(places)
    folder = evaluation.out / f"lowshot-{words.replace('%', 'percent').replace(' ', '-')}"
    how = recipe(evaluation.encoder.size.width, few_labels=True)
    how = replace(how, epochs=settings.epochs, warmup_epochs=min(how.warmup_epochs, settings.epochs // 10))
    outcome = finetune(replace(evaluation, train=part, out=folder), how)
    assert outcome.predicted is not None
    facts = {"labels": words, "images": len(part), "epochs": settings.epochs}
    return replace(outcome.measures[0], name=f"{words}, fine-tuned", settings=facts, chosen=False), outcome.predicted


def subsets(evaluation: Evaluation, settings: LowshotSettings) -> Iterator[tuple[str, np.ndarray]]:
    """(in words how many, places among the training images, ascending) of each; their names go to files."""
    train = evaluation.train
    if settings.subset:
        yield f"those of {Path(settings.subset).name}", listed_places(train, Path(settings.subset))
        return
    for text in settings.labels:
        places = drawn_places(train.labels, text, evaluation.seed)
        if evaluation.ranks.first:
            names = "".join(f"{train.images.sample_id(index)}\n" for index in train.indices[places].tolist())
            write_whole(evaluation.out / f"lowshot-{text.replace('%', 'percent')}-seed{evaluation.seed}.txt", names)
        yield text if "%" in text else f"{text} a class", places


def share_of_labels(text: str) -> tuple[float | None, int]:
    """(the share of all images, 0), or (None, labels of each class). ValueError for anything else."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        if 0.0 < (percent := float(match[1])) <= 100.0:
            return percent / 100.0, 0
    elif text.isdecimal() and int(text) > 0:
        return None, int(text)
    raise ValueError(f"labels must be a percentage such as 1%, or a number of labels a class such as 5, got {text!r}")


def drawn_places(labels: np.ndarray, text: str, seed: int) -> np.ndarray:
    """Places of so many images, as evenly over the classes as can be, ascending; a smaller draw is part of a larger.

    labels: (n,) int64, each image's class. text: as of LowshotSettings.labels. A share of all images is rounded down;
    some classes, drawn at random, have one more than others, and each has one at least. A class that has fewer than
    others are asked for gives all of its own.
    """
    share, each = share_of_labels(text)
    return even_places(labels, seed, total=None if share is None else int(share * len(labels) + 1e-9), each=each)


def listed_places(train: Labelled, path: Path) -> np.ndarray:
    """Places of the images that a file names, by their whole names or the last parts of them, ascending.

    Raises ValueError for a file that is not there, for names that no image of the training split has or several have,
    and for images of one class alone.
    """
    if not path.is_file():
        raise ValueError(f"subset={path} is no file; give one with the name of an image a line")
    wanted = {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    found: dict[str, int] = {}
    for place, index in enumerate(train.indices.tolist()):
        name = train.images.sample_id(index)
        for match in wanted & {name, name.rpartition("/")[2]}:
            if match in found:
                first = train.images.sample_id(int(train.indices[found[match]]))
                raise ValueError(f"{path} names {match}, which several images are called: {first} and {name}")
            found[match] = place
    if missing := sorted(wanted - found.keys()):
        raise ValueError(
            f"{path} names {len(missing)} images that {train.images.name} does not have with a label, such as "
            f"{missing[0]}; its own names are like {train.images.sample_id(int(train.indices[0]))}"
        )
    places = np.unique(np.array(list(found.values()), dtype=np.int64))
    if len(np.unique(train.labels[places])) < 2:
        raise ValueError(
            f"{path} names {len(places)} images, of fewer than two classes: there is nothing to tell apart"
        )
    return places
