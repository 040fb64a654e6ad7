"""How good the features are: the health check during training, and the report at its end."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ijepa_scale import build
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.order import permuted_index
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.evals.features import pooled_features
from ijepa_scale.evals.knn import knn_top1
from ijepa_scale.evals.probes import Features, probe_scores
from ijepa_scale.masking.packing import Packed
from ijepa_scale.metrics import drift, feature_std, health_verdict, rankme, read_records
from ijepa_scale.models.ijepa import initialize_weights
from ijepa_scale.run import Run
from ijepa_scale.visualize.masks import draw_masks
from ijepa_scale.visualize.report import draw_loss_curve, draw_scores, report_table, write_report

EVAL_STREAM = 1_000_003  # the "epoch" of the permutation that picks evaluation images
MASK_PREVIEW_IMAGES = 8


def eval_crops(run: Run, images: ImageSet, indices: list[int]) -> Iterator[torch.Tensor]:
    """Centre crops of this rank's share of the images, in batches; every rank yields equally many of each size."""
    own = indices[run.ranks.rank :: run.ranks.world_size]
    size, batch = run.config.data.image_size, run.dataset.micro_batch_size
    for start in range(0, len(own), batch):
        crops = [center_crop(images.read_or_substitute(i)[0], size) for i in own[start : start + batch]]
        yield torch.from_numpy(np.stack(crops))


def features_of(run: Run, encoder: torch.nn.Module, images: ImageSet, indices: list[int]) -> torch.Tensor:
    """Pooled features of images, each rank computing its share: (len(indices), D) on every rank."""
    shares = run.ranks.gather(pooled_features(encoder, eval_crops(run, images, indices)))
    features = torch.empty(len(indices), shares[0].shape[1])
    for rank, share in enumerate(shares):
        features[rank :: run.ranks.world_size] = share
    return features


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
    indices = eval_indices(run, images, run.config.logging.health_images)
    model = run.engine.module
    target, context = (features_of(run, e, images, indices) for e in (model.target_encoder, model.context_encoder))
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
    fit = len(indices) * 3 // 4
    for name, column in list(images.label_columns().items())[:1]:
        labels = torch.from_numpy(column.values[indices])
        if bool((labels >= 0).all()) and bool(torch.isfinite(target).all()):
            record["knn"] = knn_top1(target[:fit], labels[:fit], target[fit:], labels[fit:])
            record["knn_label"] = name
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
        return [indices[low:high] % num_patches for low, high in pairwise(bounds)]

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
    labels = {
        name: column for name, column in test_images.label_columns().items() if name in train_images.label_columns()
    }
    found, _ = checkpoints.newest_good(folder.checkpoints, ranks)
    fit, held = report_indices(run)
    why = ""
    if not labels:
        why = "the source has no labels to probe with"
    elif not fit or not held:
        why = f"{len(fit)} images to fit on and {len(held)} to score on; see report.train_images and report.test_images"
    elif not found:
        why = "there is no checkpoint of the target encoder"
    if why or not found:
        if ranks.first:
            write_report(folder.path / "report.json", [], step=run.horizon.stop, note=why)
            print(f"no probes: {why}; curves are in {folder.path / 'loss_curve.png'}")
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
        features[which] = Features(
            *(
                features_of(run, encoder, images, chosen)
                for images, chosen in ((train_images, fit), (test_images, held))
            )
        )
    if ranks.first:
        both = {name: (train_images.label_columns()[name].values[fit], labels[name].values[held]) for name in labels}
        scores = probe_scores(both, **features)
        facts = {
            "step": found.step,
            "checkpoint": found.path.name,
            "seed": config.seed,
            "train_images": len(fit),
            "held_out": run.evaluation.held_out,
        }
        write_report(folder.path / "report.json", scores, **facts)
        draw_scores(folder.path / "scores.png", scores)
        Console(emoji=False).print(report_table(scores))
        if not run.evaluation.held_out:
            print("the source has no validation split: the probes' test images were among the training images")
        print(f"report: {folder.path}/report.json, loss_curve.png, scores.png, masks.png")
    ranks.barrier()


def report_indices(run: Run) -> tuple[list[int], list[int]]:
    """Images that the probes are fitted on, and others that they are scored on."""
    train_images, test_images, options = run.evaluation.train, run.evaluation.test, run.config.report
    if run.evaluation.held_out:
        return eval_indices(run, train_images, options.train_images), eval_indices(
            run, test_images, options.test_images
        )
    fit = eval_indices(run, train_images, min(options.train_images, 2 * len(train_images) // 3))
    return fit, eval_indices(run, test_images, options.test_images, skip=len(fit))
