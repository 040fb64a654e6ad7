"""Probes of a run's checkpoints, as the verb evaluate has them, of the encoder that the objective calls the best."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale import build
from ijepa_scale.compare.runs import Training
from ijepa_scale.config import CompareConfig, PretrainConfig
from ijepa_scale.data.files import write_whole
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.distributed import alone
from ijepa_scale.evals.evaluation import Evaluation, Labelled, Outcome
from ijepa_scale.evals.knn import KnnSettings, knn
from ijepa_scale.evals.labels import labelled_pair, some_of
from ijepa_scale.evals.logistic import LogisticSettings, logistic
from ijepa_scale.evals.lowshot import LowshotSettings, lowshot
from ijepa_scale.exchange.run import read_weights
from ijepa_scale.exchange.weights import digest
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.run.init_from import fill_initial
from ijepa_scale.run.report import plain_encoder

PROBES = "probes.jsonl"
NEIGHBOURS = 20  # of k-NN, as in the report of a run
BATCH = 128  # images encoded at a time

Pairs = dict[str, tuple[Labelled, Labelled]]  # label -> images to fit on, images to score on
Scores = dict[str, dict[str, Any]]  # "probe label" -> value, error and chance, in percent


def probe_names(config: CompareConfig) -> list[str]:
    """Of the probes, as they are called in scores, before the label."""
    return ["k-NN", "linear", f"{config.labels_per_class} labels"]


def labelled_images(config: CompareConfig, of: PretrainConfig) -> Pairs:
    """The images that probes are fitted and scored on: the same for every recipe and seed, and for every label.

    Opens the source, and renders scenes that are not there yet. Raises ValueError where a label is not there.
    """
    images = build.build_eval_images(of)
    there = [name for name in images.test.label_columns() if name in images.train.label_columns()]
    if not (labels := config.labels or there):
        raise ValueError(f"{images.train.name} has no column of classes to probe with; name one in labels")
    pairs: Pairs = {}
    held_out = None  # of one split: by the first label, for all
    for label in labels:
        pair = labelled_pair(images.train, images.test, label, held_out=held_out)
        held_out = pair[1].indices if held_out is None else held_out
        if pairs:
            chosen = zip(pair, next(iter(pairs.values())), strict=True)
            pairs[label] = tuple(
                part.take(np.flatnonzero(np.isin(part.indices, first.indices))) for part, first in chosen
            )  # type: ignore[assignment]
        else:
            counts = (config.train_images, config.test_images)
            pairs[label] = tuple(some_of(part, count, 0) for part, count in zip(pair, counts, strict=True))  # type: ignore[assignment]
    return pairs


def probe(training: Training, config: CompareConfig, pairs: Pairs, told: Callable[[int, Scores], None]) -> None:
    """Probe a run's checkpoints that are not probed yet; each comes to its file at once, and told is told.

    Probed checkpoints but the last are deleted.
    """
    file, asked = training.folder / PROBES, asked_for(config, pairs)
    done = read_probes(file, asked)
    objective = build.build_objective(training.config)
    for step in training.probed:
        if step in done:
            continue
        path = training.folder / "checkpoints" / checkpoints.folder_name(step)
        found, complaint = checkpoints.verify(path, alone())
        if found is None:
            raise ValueError(f"{path} cannot be probed: {complaint}; delete {training.folder} to train it again")
        encoder, network = plain_encoder(objective)
        read_weights(found, encoder, objective, network)
        done[step] = scores_of(encoder, training.config, config, pairs)
        write_probes(file, asked, done)
        told(step, done[step])
    torch.cuda.empty_cache()  # where there is a GPU, which the next run takes
    checkpoints.prune(training.folder / "checkpoints", alone(), keep_last=1, keep_every=0, newest=training.steps)


def probe_initial(training: Training, config: CompareConfig, pairs: Pairs) -> Scores:
    """Scores of what every run of the training's seed starts from, which is the same encoder for all recipes."""
    objective = build.build_objective(training.config)
    encoder, network = plain_encoder(objective)
    fill_initial(encoder, objective, network, alone(), {})
    images = [part.images.digest for part in next(iter(pairs.values()))]
    asked = {**asked_for(config, pairs), "encoder": digest(encoder), "images": images}
    file = training.folder.parent / f"initial-seed{training.seed}.jsonl"
    try:
        done = read_probes(file, asked)
    except ValueError:  # those of a start that came to no checkpoint, with other settings
        done = {}
    if 0 not in done:
        done = {0: scores_of(encoder, training.config, config, pairs)}
        write_probes(file, asked, done)
    return done[0]


def scores_of(encoder: VisionTransformer, of: PretrainConfig, config: CompareConfig, pairs: Pairs) -> Scores:
    """k-NN, a linear probe, and one of few labels a class, drawn by the run's seed, for each label."""
    few = str(config.labels_per_class)
    tasks: list[Callable[[Evaluation], Outcome]] = [
        functools.partial(knn, settings=KnnSettings(k=(NEIGHBOURS,))),
        functools.partial(logistic, settings=LogisticSettings()),
        functools.partial(lowshot, settings=LowshotSettings(labels=(few,))),
    ]
    encoder.eval().requires_grad_(False)
    ranks, sha256 = alone(), digest(encoder)
    scores: Scores = {}
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".features-") as folder:
        for label, (train, test) in pairs.items():
            evaluation = Evaluation(
                encoder=encoder.to(ranks.device),
                sha256=sha256,
                image_size=of.data.image_size,
                train=train,
                test=test,
                ranks=ranks,
                seed=of.seed,
                batch_size=BATCH,
                workers=of.data.workers,
                keep=Path(folder),
                out=Path(folder),
            )
            for name, task in zip(probe_names(config), tasks, strict=True):
                measure = next(measure for measure in task(evaluation).measures if measure.chosen)
                scores[f"{name} {label}"] = {"value": measure.value, "error": measure.error, "chance": measure.chance}
    return scores


def asked_for(config: CompareConfig, pairs: Pairs) -> dict[str, Any]:
    """What scores depend on beside the weights: they are kept with it."""
    return {
        "labels": list(pairs),
        "train_images": config.train_images,
        "test_images": config.test_images,
        "labels_per_class": config.labels_per_class,
    }


def read_probes(file: Path, asked: dict[str, Any]) -> dict[int, Scores]:
    """Scores by step. Raises ValueError for those that something else was asked for."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for line in lines:
        if line["asked"] != asked:
            raise ValueError(
                f"{file} was probed with other settings: {line['asked']} there, {asked} now; restore them, or give "
                "another out"
            )
    return {line["step"]: line["scores"] for line in lines}


def write_probes(file: Path, asked: dict[str, Any], done: dict[int, Scores]) -> None:
    lines = [json.dumps({"step": step, "asked": asked, "scores": done[step]}) + "\n" for step in sorted(done)]
    write_whole(file, "".join(lines))
