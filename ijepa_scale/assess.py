"""How good the features are: the health check during training, and the report at its end."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ijepa_scale import build
from ijepa_scale.data.images import BadImageError, ImageSet
from ijepa_scale.data.order import permuted_index
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.evals.features import pooled_features
from ijepa_scale.evals.knn import knn_top1
from ijepa_scale.evals.probes import Features, probe_scores, unfit
from ijepa_scale.masking.packing import Packed
from ijepa_scale.metrics import drift, feature_std, health_verdict, rankme, read_records
from ijepa_scale.models.ijepa import initialize_weights
from ijepa_scale.run import Run
from ijepa_scale.visualize.masks import draw_masks
from ijepa_scale.visualize.report import draw_loss_curve, draw_scores, report_table, write_report

EVAL_STREAM = 1_000_003  # the "epoch" of the permutation that picks evaluation images
MASK_PREVIEW_IMAGES = 8


def eval_crops(run: Run, images: ImageSet, own: list[int], bad: dict[int, str]) -> Iterator[torch.Tensor]:
    """Centre crops in batches; of an image that cannot be read a black one, and into bad why."""
    size, batch = run.config.data.image_size, run.dataset.micro_batch_size
    for start in range(0, len(own), batch):
        crops = np.zeros((len(own[start : start + batch]), 3, size, size), np.uint8)
        for place, index in enumerate(own[start : start + batch]):
            try:
                crops[place] = center_crop(images.read(index), size)
            except BadImageError as error:
                bad[index] = str(error)
        yield torch.from_numpy(crops)


def features_of(
    run: Run, encoders: Sequence[torch.nn.Module], images: ImageSet, indices: list[int]
) -> tuple[torch.Tensor, list[int]]:
    """Pooled features (len(encoders), n, D) of the images that can be read, and their indices, on every rank.

    Images are read once for all encoders. Each rank computes its share, in as many batches as any other: at ZeRO-3
    ranks need each other in the forward. Raises BadImageError, on every rank, where not one can be read.
    """
    bad: dict[int, str] = {}
    own = indices[run.ranks.rank :: run.ranks.world_size]
    crops = itertools.tee(eval_crops(run, images, own, bad), len(encoders))
    share = torch.stack([pooled_features(encoder, batches) for encoder, batches in zip(encoders, crops, strict=True)])
    features = torch.empty(len(encoders), len(indices), share.shape[-1])
    for rank, (there, bad_there) in enumerate(run.ranks.gather((share, bad))):
        features[:, rank :: run.ranks.world_size] = there
        bad.update(bad_there)
    kept = [place for place, index in enumerate(indices) if index not in bad]
    if not kept:
        raise BadImageError(
            f"{images.name}: none of {len(indices)} images can be read, the first because: {bad[indices[0]]}; the "
            "checkpoints are whole: bring the images back, then start the same command again"
        )
    return features[:, kept], [indices[place] for place in kept]


def eval_indices(run: Run, images: ImageSet, count: int, *, skip: int = 0) -> list[int]:
    """A fixed random choice of images, as many as every rank can take an equal share of."""
    count = min(count, len(images) - skip) // run.ranks.world_size * run.ranks.world_size
    return [permuted_index(0, EVAL_STREAM, len(images), skip + i) for i in range(count)]


def measure_health(
    run: Run,
    step: int,
    history: list[dict[str, Any]],
    log: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
    *,
    loss: float | None,
) -> None:
    """Are the features still worth something? Collective: every rank computes its share. loss: of the step before."""
    images = run.evaluation.train
    wanted = eval_indices(run, images, run.config.logging.health_images)
    model = run.engine.module
    (target, context), indices = features_of(run, [model.target_encoder, model.context_encoder], images, wanted)
    if not run.ranks.first:
        return
    record: dict[str, Any] = {
        "kind": "health",
        "step": step,
        "feature_std": feature_std(target),
        "rankme": rankme(target),
        "drift": drift(target, context),
        "loss": loss,
    }
    for name, column in images.label_columns().items():
        labels = column.values[indices]
        labelled = np.flatnonzero(labels >= 0)
        fit, held = np.split(labelled, [len(labelled) * 3 // 4])
        if unfit(labels[fit], labels[held], at_least=1):
            continue  # with the next
        if bool(torch.isfinite(target).all()):
            y = torch.from_numpy(labels)
            record["knn"] = knn_top1(target[fit], y[fit], target[held], y[held])
            record["knn_label"] = name
        break
    history.append(record)
    log(record)
    say(f"health at step {step}: {health_verdict(history)}")


def preview_masks(run: Run) -> None:
    """masks.png: what the networks see of the run's first images."""
    batch = run.dataset.preview(run.start_step)
    count = min(MASK_PREVIEW_IMAGES, len(batch.indices))
    num_patches = batch.masks.num_patches

    def per_image(packed: Packed) -> list[np.ndarray]:
        indices, bounds = packed.indices_T.numpy(), packed.cu_seqlens.numpy()
        return [indices[low:high] % num_patches for low, high in itertools.pairwise(bounds)]

    blocks = per_image(batch.masks.target_blocks)
    each = len(blocks) // len(batch.indices)
    grid = run.dataset.blocks.grid
    draw_masks(
        run.folder.path / "masks.png",
        batch.images[:count].numpy(),
        grid.rows,
        grid.columns,
        per_image(batch.masks.context)[:count],
        [blocks[i * each : (i + 1) * each] for i in range(count)],
    )


def report(run: Run) -> None:
    """Curves, and scores of the target encoder beside the same model at initialisation. Collective."""
    config, ranks, folder = run.config, run.ranks, run.folder
    if ranks.first:
        records = read_records(folder.metrics) if folder.metrics.exists() else []
        if records:
            draw_loss_curve(folder.path / "loss_curve.png", records)
    train_images, test_images = run.evaluation.train, run.evaluation.test
    of_train, of_test = train_images.label_columns(), test_images.label_columns()
    found, _ = checkpoints.newest_good(folder.checkpoints, ranks)
    fit, held = report_indices(run)
    labels = {name: (of_train[name].values, of_test[name].values) for name in of_test if name in of_train}
    reasons = {name: unfit(train[fit], test[held]) for name, (train, test) in labels.items()}
    why = ""
    if not labels:
        why = "the source has no labels to probe with"
    elif not fit or not held:
        why = f"{len(fit)} images to fit on and {len(held)} to score on; see report.train_images and report.test_images"
    elif not found:
        why = "there is no checkpoint of the target encoder"
    elif all(reasons.values()):
        why = joined(reasons)
    if why or not found:
        report_without_probes(run, why)
        return
    if ranks.first:
        print("probing the target encoder and the same encoder at initialisation ...", flush=True)
    encoder = build.build_encoder(config).to(ranks.device)
    features = {}
    for which in ("initial", "trained"):
        if which == "initial":
            initialize_weights(encoder, config.seed, prefix="context_encoder.")
        else:
            build.load_target_encoder(encoder, found)
        (train_features,), fitted = features_of(run, [encoder], train_images, fit)
        (test_features,), scored = features_of(run, [encoder], test_images, held)
        features[which] = Features(train_features, test_features)
    if ranks.first:
        both = {name: (train[fitted], test[scored]) for name, (train, test) in labels.items()}
        scores, reasons = probe_scores(both, **features)
        if not scores:
            report_without_probes(run, joined(reasons))
    if ranks.first and scores:
        facts = {
            "step": found.step,
            "checkpoint": found.path.name,
            "seed": config.seed,
            "train_images": len(fitted),
            "held_out": run.evaluation.held_out,
            "not_probed": reasons,
        }
        write_report(folder.path / "report.json", scores, **facts)
        draw_scores(folder.path / "scores.png", scores)
        Console(emoji=False).print(report_table(scores))
        for name, reason in reasons.items():
            print(f"no probes of {name}: {reason}")
        if unread := len(fit) + len(held) - len(fitted) - len(scored):
            print(f"{unread} of {len(fit) + len(held)} images cannot be read and were left out of the probes")
        if not run.evaluation.held_out:
            print("the source has no validation split: the probes' test images were among the training images")
        print(f"report: {folder.path}/report.json, loss_curve.png, scores.png, masks.png")
    ranks.barrier()


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
