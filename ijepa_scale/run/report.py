"""The report at a run's end: curves, scores of the trained encoder beside what it started from, and the page."""

import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from ijepa_scale.config.objective_sections import FIXED_TARGETS
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.evals.probes import Features, probe_scores, unfit
from ijepa_scale.evals.scores import Score, report_table, write_report
from ijepa_scale.exchange.run import read_weights
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.run.health import eval_indices, features_of
from ijepa_scale.run.init_from import fill_initial
from ijepa_scale.run.page import write_page
from ijepa_scale.run.records import read_records
from ijepa_scale.run.setup import Run
from ijepa_scale.visualize.curves import draw_loss_curve, draw_scores

Labels = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> classes of the training and of the test images


def report(run: Run) -> None:
    """Write the curves, the scores of the best of the objective's encoders, and the page. All ranks call it."""
    score(run)
    if run.ranks.first:
        write_page_or_say(run.folder.path)
    run.ranks.barrier()


def write_page_or_say(path: Path) -> None:
    """The page of a run that is finished: whatever keeps it from being written is told, and does not fail the run."""
    try:
        print(f"page: {write_page(path)}")
    except Exception as error:  # days of training have ended well, and the page can be made again at any time
        print(
            f"warning: the page of the run was not written: {type(error).__name__}: {error}. All else is there; "
            f"ijepa-scale report {shlex.quote(str(path))} (or launch/report.py) writes it, or says more",
            file=sys.stderr,
            flush=True,
        )


def score(run: Run) -> None:
    """Write the curves and the scores. All ranks call it."""
    folder = run.folder
    if run.ranks.first:
        records = read_records(folder.metrics) if folder.metrics.exists() else []
        if records:
            moving = run.objective.name not in FIXED_TARGETS
            draw_loss_curve(folder.path / "loss_curve.png", records, moving=moving)
    of_train, of_test = run.evaluation.train.label_columns(), run.evaluation.test.label_columns()
    labels = {name: (of_train[name].values, of_test[name].values) for name in of_test if name in of_train}
    found, _ = checkpoints.newest_good(folder.checkpoints, run.ranks)
    fit, held = report_indices(run)
    with torch.device("meta"):  # for its names alone
        encoders = run.objective.encoders(run.objective.build())
    why = why_unscored(labels, found, fit, held) if encoders else "no encoder is trained"
    if why or not found:
        report_without_probes(run, why)
        return
    if run.ranks.first:
        print("probing the trained encoder and what it started from ...", flush=True)
    encoder, network = plain_encoder(run.objective)
    encoder.to(run.ranks.device)
    features, began = {}, found.manifest.get("init_from", {})
    for which in ("initial", "trained"):
        if which == "initial":
            started_from = fill_initial(encoder, run.objective, network, run.ranks, began)
        else:
            read_weights(found, encoder, run.objective, network)
        features[which], fitted, scored = both_features(run, encoder, fit, held)
    if run.ranks.first:
        chosen = {name: (train[fitted], test[scored]) for name, (train, test) in labels.items()}
        scores, reasons = probe_scores(chosen, **features)
        if scores:
            facts = {"step": found.step, "checkpoint": found.path.name, "train_images": len(fitted)}
            if began:
                facts["initial"] = started_from
            tell(run, scores, reasons, facts, unread=len(fit) + len(held) - len(fitted) - len(scored))
        else:
            report_without_probes(run, joined(reasons))


def plain_encoder(objective: Objective) -> tuple[VisionTransformer, str]:
    """The best of an objective's encoders, whole on the CPU with any weights, and its name."""
    with torch.device("meta"):  # for its sizes alone
        name, best = next(iter(objective.encoders(objective.build()).items()))
    patch_size = best.patch_embed.patch_size
    return VisionTransformer(best.size, image_size=best.grid.rows * patch_size, patch_size=patch_size), name


def why_unscored(labels: Labels, found: Checkpoint | None, fit: list[int], held: list[int]) -> str:
    """Why nothing can be probed; "" if something can."""
    reasons = {name: unfit(train[fit], test[held]) for name, (train, test) in labels.items()}
    if not labels:
        return "the source has no labels to probe with"
    if not fit or not held:
        return (
            f"{len(fit)} images to fit on and {len(held)} to score on; see report.train_images and report.test_images"
        )
    if not found:
        return "there is no checkpoint"
    return joined(reasons) if all(reasons.values()) else ""


def both_features(
    run: Run, encoder: nn.Module, fit: list[int], held: list[int]
) -> tuple[Features, np.ndarray, np.ndarray]:
    """An encoder's features of the training and the test images, and which of these could be read."""
    name = "features"
    train, fitted = features_of(run, {name: encoder}, run.evaluation.train, fit)
    test, scored = features_of(run, {name: encoder}, run.evaluation.test, held)
    empty = torch.empty(0)  # on ranks that score nothing
    return Features(train.get(name, empty), test.get(name, empty)), fitted, scored


def tell(run: Run, scores: list[Score], reasons: dict[str, str], facts: dict[str, object], *, unread: int) -> None:
    """report.json, scores.png and a table. reasons: why other labels have no scores. unread: images that are bad."""
    path, held_out = run.folder.path, run.evaluation.held_out
    facts = {**facts, "seed": run.config.seed, "held_out": held_out, "not_probed": reasons}
    write_report(path / "report.json", scores, **facts)
    draw_scores(path / "scores.png", scores)
    Console(emoji=False).print(report_table(scores))
    if "initial" in facts:
        print(f"initial: {facts['initial']}")
    for name, reason in reasons.items():
        print(f"no probes of {name}: {reason}")
    if unread:
        print(f"{unread} of {sum(map(len, report_indices(run)))} images cannot be read and were left out of the probes")
    if not held_out:
        print("the source has no validation split: the probes' test images were among the training images")
    print(f"report: {path}/report.json, loss_curve.png, scores.png, masks.png")


def report_without_probes(run: Run, why: str) -> None:
    if run.ranks.first:
        write_report(run.folder.path / "report.json", [], step=run.horizon.stop, note=why)
        print(f"no probes: {why}; curves are in {run.folder.path / 'loss_curve.png'}")


def joined(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def report_indices(run: Run) -> tuple[list[int], list[int]]:
    """Images that the probes are fitted on, and others that they are scored on."""
    train_images, test_images, options = run.evaluation.train, run.evaluation.test, run.config.report
    if run.evaluation.held_out:
        return eval_indices(run, train_images, options.train_images), eval_indices(
            run, test_images, options.test_images
        )
    fit = eval_indices(run, train_images, min(options.train_images, 2 * len(train_images) // 3))
    return fit, eval_indices(run, test_images, options.test_images, skip=len(fit))
