"""How good the features are: the health check during training, and the report at its end."""

from rich.console import Console

from ijepa_scale import build
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.evals.probes import Features, probe_scores, unfit
from ijepa_scale.evals.scores import report_table, write_report
from ijepa_scale.models.initial import initialize_weights
from ijepa_scale.run.health import eval_indices, features_of
from ijepa_scale.run.records import read_records
from ijepa_scale.run.setup import Run
from ijepa_scale.visualize.curves import draw_loss_curve, draw_scores
from ijepa_scale.visualize.masks import draw_masks

MASK_PREVIEW_IMAGES = 8


def preview_masks(run: Run) -> None:
    """masks.png: what the networks see of the run's first images."""
    batch = run.dataset.preview(run.start_step)
    count = min(MASK_PREVIEW_IMAGES, len(batch.indices))
    shown = run.objective.shown(batch.masks)[:count]
    grid = run.objective.grid
    draw_masks(
        run.folder.path / "masks.png",
        batch.images[:count].numpy(),
        grid.rows,
        grid.columns,
        [one.seen for one in shown],
        [one.hidden for one in shown],
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
