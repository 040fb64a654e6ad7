"""The runs of learning.md: what makes a small I-JEPA learn more. Many at once on one GPU, or one on a CPU.

python docs/lab/learning.py --data /data/tiny-imagenet-100 --out /tmp/learning              those not there yet
python docs/lab/learning.py --data scenes --out /tmp/learning --only "scenes.*" --processes 4
python docs/lab/learning.py --out /tmp/learning --table                                     what has been found so far
python docs/lab/learning.py --out docs/lab --plot docs/lab/learning.png                     scores over images, as there

--data: labelled images that `datasets` loads, or scenes. Each finished run is a line of OUT/learning.jsonl. The same
command goes on with those that are not there. A run leaves most of a GPU idle: give it several --processes, under CUDA
MPS (nvidia-cuda-mps-control -d), with several runs --at-once in each.
"""

import argparse
import contextlib
import fcntl
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

from dense_loss import Recipe  # noqa: E402
from dense_step import Run  # noqa: E402

from ijepa_scale.data.scenes.prepare import prepare_scenes  # noqa: E402
from ijepa_scale.evals.knn import knn_top1  # noqa: E402
from ijepa_scale.evals.logistic import linear_probe_top1  # noqa: E402

PROBE_IMAGES = 10_000  # to fit on
SCENES, HELD_OUT = 20_000, 4_000
SCORES = ("k-NN", "linear", "RankMe", "LiDAR", "neighbours", "opposites")
UNLABELLED, VIEWS = 512, 4  # images, and crops of each, for what is told without labels
ADAMW = {"muon_lr": 0.0, "batch": 128, "ema": (0.99, 1.0), "crop_scale": (0.3, 1.0), "flip": False}
PATCH_4 = {"patch": 4, "batch": 32, "min_keep": 10}
TINY = {"images": 38_400, "variance": 0.02, "covariance": 0.004, "muon_lr": 1e-3, "ema": (0.99, 1.0)}
TINY |= {"crop_scale": (0.3, 1.0), "flip": False}
CALM = {"weight_decay": (0.04, 0.04), "ema": (0.98, 0.98), "final_lr": 1e-3}  # nothing changes after the warm-up

CALM_3, CALM_10 = ({**CALM, "variance": 0.003 * w, "covariance": 0.0006 * w} for w in (3, 10))
SLOW = {**CALM_3, "images": 192_000, "warmup": 0.5}  # small_images.yaml
BEFORE = {**ADAMW, "images": 256_000, "variance": 0.005, "covariance": 0.001}  # small_images.yaml before Muon

IMAGES: dict[str, dict[str, Any]] = {
    "1M, nothing decays, w x3": {**CALM_3, "images": 1_024_000, "curve": 2000},
    "1M": {"images": 1_024_000, "curve": 2000},
    "nothing decays": CALM,
    "nothing decays, seed 1": {**CALM, "seed": 1},
    "nothing decays, seed 2": {**CALM, "seed": 2},
    "nothing decays, w x3": CALM_3,
    "nothing decays, w x3, seed 1": {**CALM_3, "seed": 1},
    "nothing decays, w x10": CALM_10,
    "nothing decays, w x10, seed 1": {**CALM_10, "seed": 1},
    "seed 0": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "weight decay 0.04": {"weight_decay": (0.04, 0.04)},
    "ema 0.98": {"ema": (0.98, 0.98)},
    "lr stays": {"final_lr": 1e-3},
    "w x3": {"variance": 0.009, "covariance": 0.0018},
    "w x10": {"variance": 0.03, "covariance": 0.006},
    "192k, nothing decays": {**CALM, "images": 192_000},
    "192k, nothing decays, seed 1": {**CALM, "images": 192_000, "seed": 1},
    "192k, nothing decays, warm-up 0.5": {**CALM, "images": 192_000, "warmup": 0.5},
    "192k, nothing decays, warm-up 0.5, seed 1": {**CALM, "images": 192_000, "warmup": 0.5, "seed": 1},
    "192k, nothing decays, w x3": {**CALM_3, "images": 192_000},
    "192k, nothing decays, w x3, seed 1": {**CALM_3, "images": 192_000, "seed": 1},
    "192k, nothing decays, w x3, warm-up 0.5": {**CALM_3, "images": 192_000, "warmup": 0.5},
    "192k, nothing decays, w x10": {**CALM_10, "images": 192_000},
    "192k, nothing decays, w x3, one lr": {**CALM_3, "images": 192_000, "lr": 2.5e-3, "final_lr": 2.5e-3},
    "192k, nothing decays, w x3, muon 5e-3": {**CALM_3, "images": 192_000, "muon_lr": 5e-3},
    "192k, AdamW, nothing decays, w x3": {**ADAMW, **CALM_3, "images": 192_000},
    "small_images": SLOW,
    "small_images, seed 1": {**SLOW, "seed": 1},
    "small_images, seed 2": {**SLOW, "seed": 2},
    "small_images before Muon": BEFORE,
    "small_images before Muon, seed 1": {**BEFORE, "seed": 1},
    "small_images before Muon, seed 2": {**BEFORE, "seed": 2},
    "small_images, muon 1.2e-3": {**SLOW, "muon_lr": 1.2e-3},
    "small_images, context of 0.5 to 0.7": {**SLOW, "context_scale": (0.5, 0.7)},
    "small_images, 2 sets of masks, 32 a step": {**SLOW, "mask_sets": 2, "batch": 32, "images": 96_000},
    "small_images, 4 sets of masks, 16 a step": {**SLOW, "mask_sets": 4, "batch": 16, "images": 48_000},
    "small_images, cooldown": {**SLOW, "cooldown": 0.2},
    "small_images, one lr": {**SLOW, "lr": 2.5e-3, "final_lr": 2.5e-3},
    "small_images, covariance as it was": {**SLOW, "covariance": 0.0006},
    "small_images, predictor 192 wide": {**SLOW, "predictor_width": 192},
    "small_images, predictor 6 deep": {**SLOW, "predictor_depth": 6},
    "small_images, 2 large targets": {**SLOW, "target_scale": (0.3, 0.4), "target_blocks": 2},
    "small_images, 6 small targets": {**SLOW, "target_scale": (0.1, 0.15), "target_blocks": 6},
    "small_images, ema 0.99": {**SLOW, "ema": (0.99, 0.99)},
    "small_images, ema 0.96": {**SLOW, "ema": (0.96, 0.96)},
    "small_images, weight decay 0.2": {**SLOW, "weight_decay": (0.2, 0.2)},
    "small_images, crops of 0.1": {**SLOW, "crop_scale": (0.1, 1.0)},
    "small_images, no mirror": {**SLOW, "flip": False},
    "small_images, stochastic positions 0.25": {**SLOW, "stochastic_positions": 0.25},
    "small_images, stochastic positions 1": {**SLOW, "stochastic_positions": 1.0},
    "small_images, context loss 0.2": {**SLOW, "context_loss": 0.2},
    "small_images, layers 2, 4, 6": {**SLOW, "target_layers": (2, 4, 6)},
    "small_images, SIGReg 0.001": {**SLOW, "sigreg": 0.001, "variance": 0.0, "covariance": 0.0},
    "small_images, SIGReg 0.005": {**SLOW, "sigreg": 0.005, "variance": 0.0, "covariance": 0.0},
    "small_images, l1": {**SLOW, "loss": "l1"},
    "small_images, 9 blocks": {**SLOW, "depth": 9},
    "small_images, width 256": {**SLOW, "width": 256},
    "small_images, 64k, patch 4": {**SLOW, **PATCH_4, "images": 64_000},
    "small_images, 32 a step": {**SLOW, "batch": 32},
}
STEADY = {**TINY, **CALM, "muon_lr": 2.5e-3, "batch": 32, "warmup": 0.5, "crop_scale": (0.8, 1.0)}

ON_SCENES: dict[str, dict[str, Any]] = {
    "scenes: tiny.yaml": {**TINY, "images": 39_936, "batch": 128},
    "scenes: steady": STEADY,
    "scenes: steady, 154k": {**STEADY, "images": 153_600},
    "scenes: steady, patch 4": {**STEADY, **PATCH_4},
    "scenes: steady, w / 3": {**STEADY, "variance": 0.007, "covariance": 0.0014},
    "scenes: steady, w x3": {**STEADY, "variance": 0.06, "covariance": 0.012},
    "scenes: steady, warm-up 0.125": {**STEADY, "warmup": 0.125},
    "scenes: steady, 16 a step": {**STEADY, "batch": 16},
    "scenes: steady, 4 sets of masks": {**STEADY, "mask_sets": 4},
    "scenes: steady, no crops": {**STEADY, "crop_scale": (1.0, 1.0)},
    "scenes: steady, mirrored": {**STEADY, "flip": True},
    "scenes: steady, context of 0.5 to 0.7": {**STEADY, "context_scale": (0.5, 0.7)},
    "scenes: steady, 6 small targets": {**STEADY, "target_scale": (0.1, 0.15), "target_blocks": 6},
    "scenes: steady, 2 large targets": {**STEADY, "target_scale": (0.3, 0.4), "target_blocks": 2},
    "scenes: steady, layers 2, 4, 6": {**STEADY, "target_layers": (2, 4, 6)},
    "scenes: steady, layer 3": {**STEADY, "target_layers": (3,)},
    "scenes: steady, muon 5e-3": {**STEADY, "muon_lr": 5e-3},
    "scenes: steady, seed 1": {**STEADY, "seed": 1},
    "scenes: steady, seed 2": {**STEADY, "seed": 2},
    "scenes: tiny.yaml, seed 1": {**TINY, "images": 39_936, "batch": 128, "seed": 1},
    "scenes: tiny.yaml, seed 2": {**TINY, "images": 39_936, "batch": 128, "seed": 2},
    "scenes: steady, patch 4, 154k": {**STEADY, **PATCH_4, "images": 153_600},
    "scenes: steady, 614k": {**STEADY, "images": 614_400},
}


def recipes(scenes: bool) -> list[Recipe]:
    return [replace(Recipe(name=name), **values) for name, values in (ON_SCENES if scenes else IMAGES).items()]


# --- data: (images (n, 3, S, S) uint8, labels (n, labels of an image) int64) of each split, kept as arrays


def prepare(data: str, cache: Path) -> None:
    import datasets

    if (cache / "test_labels.npy").exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    scenes = data == "scenes"
    if scenes:
        given = {"num_train": SCENES, "num_validation": HELD_OUT, "image_size": Recipe().image_size, "seed": 0}
        data = str(prepare_scenes(cache, **given))
    loaded = datasets.load_dataset(data)
    held_out = next(name for name in ("validation", "test", "val") if name in loaded)
    for name, split in (("train", "train"), ("test", held_out)):
        columns = ["count", "distance"] if scenes else ["label"]
        rows = loaded[split].shuffle(seed=0)
        parts = [rows.select(range(i, min(i + 500, len(rows)))) for i in range(0, len(rows), 500)]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda part: [_pixels(one) for one in part["image"]], parts))
        np.save(cache / f"{name}_images.npy", np.stack([one for part in images for one in part]))
        np.save(cache / f"{name}_labels.npy", np.stack([np.asarray(rows[column]) for column in columns], 1))


def _pixels(image: Any) -> np.ndarray:
    side = Recipe().image_size
    square = image.convert("RGB") if image.size == (side, side) else image.convert("RGB").resize((side, side))
    return np.asarray(square).transpose(2, 0, 1)


def load(cache: Path, device: torch.device) -> dict[str, torch.Tensor]:
    return {path.stem: torch.from_numpy(np.load(path)).to(device) for path in cache.glob("*.npy")}


# --- scores


@torch.no_grad()
def features(encoder: Any, images: torch.Tensor, last: int) -> torch.Tensor:
    """(n, D * last), the mean over patches of each of the last blocks' outputs."""
    blocks = list(range(-last, 0))
    parts = [torch.cat([x.mean(1) for x in encoder.intermediate(some, blocks)], 1) for some in images.split(500)]
    return torch.cat(parts)


def score(run: Run, data: dict[str, torch.Tensor]) -> dict[str, float]:
    """Percent of the test images that k-NN and logistic regressions get right, and RankMe."""
    encoder, found = run.module.target_encoder, {}
    train, labels = data["train_images"][:PROBE_IMAGES], data["train_labels"][:PROBE_IMAGES]
    for last in (1, 4):
        fitted, tested = (features(encoder, images, last) for images in (train, data["test_images"]))
        for column in range(labels.shape[1]):
            known = (fitted, labels[:, column], tested, data["test_labels"][:, column])
            name = ("", " of the second label")[column]
            if last == 1:
                found["k-NN" + name] = knn_top1(*known)
            linear = "linear" if last == 1 else "linear, last 4"
            found[linear + name] = linear_probe_top1(*known, l2=(1e-1, 1e-2, 1e-3))
        if last == 1:
            spread = torch.linalg.svdvals(tested[:2000] - tested[:2000].mean(0))
            share = spread / spread.sum()
            found["RankMe"] = float(torch.exp(-(share * (share + 1e-12).log()).sum()))
    return found | unlabelled(run, data["test_images"][:UNLABELLED])


@torch.no_grad()
def unlabelled(run: Run, images: torch.Tensor) -> dict[str, float]:
    """LiDAR of the pooled features of crops; and for what percent of images (n, 3, H, W) uint8 a token's nearest, of
    all images' tokens at another patch, is of the same image: at the patch beside it, and at the opposite one."""
    encoder = run.module.target_encoder
    (tokens,) = encoder.intermediate(images, [-1])
    tokens = F.normalize(tokens - tokens.mean(0), dim=-1).transpose(0, 1)  # (N, n, D), less what a patch alone says
    patches = range(0, len(tokens), 2)
    found = {
        "neighbours": same_image([(tokens[p], tokens[p + 1]) for p in patches]),
        "opposites": same_image([(tokens[p], tokens[-1 - p]) for p in patches]),
    }
    generator = torch.Generator(images.device).manual_seed(0)  # not the run's: scores do not change what follows
    crops = [(run.crops(images, generator) * run.std + run.mean).round().to(torch.uint8) for _ in range(VIEWS)]
    views = torch.stack([encoder.intermediate(some, [-1])[0].mean(1) for some in crops], 1)
    return {"LiDAR": lidar(views.double()), **found}


def same_image(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    right = [(a @ b.T).argmax(1) == torch.arange(len(a), device=a.device) for a, b in pairs]
    return 100 * float(torch.stack(right).double().mean())


def lidar(views: torch.Tensor) -> float:
    """arXiv:2312.04000, of (images, views, D): how many directions tell images apart, in which views of one agree."""
    means = views.mean(1, keepdim=True)
    between, within = ((x.flatten(0, 1).T @ x.flatten(0, 1)) for x in (means - means.mean(0), views - means))
    between, within = between / (len(views) - 1), within / (views.shape[0] * (views.shape[1] - 1))
    values, vectors = torch.linalg.eigh(within + 1e-4 * torch.eye(len(within)).to(within))
    root = vectors / values.sqrt() @ vectors.T
    share = torch.linalg.eigvalsh(root @ between @ root).clamp(min=0)
    share = share / share.sum()
    return float(torch.exp(-(share * (share + 1e-12).log()).sum()))


# --- processes


def work(queue: Any, cache: Path, out: Path, device_name: str, deadline: float, at_once: int) -> None:
    """A process: runs until none is left, on a GPU several beside each other, each in a thread."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    data = load(cache, torch.device(device_name))
    if device_name == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(at_once) as threads:
        for done in [threads.submit(take, queue, data, out, deadline) for _ in range(at_once)]:
            done.result()


def take(queue: Any, data: dict[str, torch.Tensor], out: Path, deadline: float) -> None:
    """Runs, one after another. What the deadline cuts off is scored as it is, and says so."""
    on_gpu = data["train_images"].is_cuda
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        while time.time() < deadline and (recipe := queue.get()) is not None:
            started, run = time.time(), Run(recipe, data["train_images"])
            while run.done < recipe.steps and time.time() < deadline:
                before = run.done
                run.train(min(recipe.steps, run.done + (50 if on_gpu else 1)))  # between looks at the clock
                if recipe.curve and before // recipe.curve < run.done // recipe.curve and run.done < recipe.steps:
                    keep(run, data, out, time.time() - started)
            keep(run, data, out, time.time() - started)


def keep(run: Run, data: dict[str, torch.Tensor], out: Path, seconds: float) -> None:
    recipe = run.recipe
    found = {"steps": run.done, "images": run.done * recipe.batch, "seconds": seconds, "loss": float(run.last_loss)}
    found["ended"] = run.done == recipe.steps
    if np.isfinite(found["loss"]):
        found |= score(run, data)
    with open(out / "learning.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({**found, "recipe": asdict(recipe)}) + "\n")
    print(f"{recipe.name}: {found['images']:,} images, {seconds:.0f} s, {in_words(found)}", flush=True)


def in_words(found: dict[str, Any]) -> str:
    scores = {name: value for name, value in found.items() if name.startswith(SCORES)}
    return ", ".join(f"{name} {value:.1f}" for name, value in scores.items()) or "the loss is not finite"


def results(out: Path) -> Iterator[dict[str, Any]]:
    path = out / "learning.jsonl"
    yield from map(json.loads, path.read_text().splitlines() if path.exists() else ())


def table(out: Path) -> str:
    """Of all results, in Markdown."""
    rows = list(results(out))
    names = [
        name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith(("k-NN", "lin", "Ra"))
    ]
    lines = [" | ".join(["run", "images", "steps", *names]), " | ".join(["---"] * (len(names) + 3))]
    for row in rows:
        name = row["recipe"]["name"] + ("" if row["ended"] else " (cut off)")
        scores = [f"{row[key]:.1f}" if key in row else "" for key in names]
        lines.append(" | ".join([name, f"{row['images']:,}", f"{row['steps']:,}", *scores]))
    return "\n".join(f"| {line} |" for line in lines)


def plot(out: Path, path: Path) -> None:
    """Scores over images: runs of one schedule as curves, others as points."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharex=True, layout="constrained")
    for axis, score in zip(axes, ("k-NN", "linear", "linear, last 4"), strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in results(out):
            recipe = row["recipe"]
            if recipe["name"].startswith("scenes") or score not in row:  # whose loss was not finite
                continue
            kind = "ends on its schedule" if recipe["final_lr"] < recipe["lr"] else "nothing decays"
            kind = "falls at the end" if recipe.get("cooldown") else kind
            kind += {3: " (w x3)", 10: " (w x10)"}.get(round(recipe["variance"] / 0.003), "")
            kind = kind if recipe["muon_lr"] else "AdamW"
            curves.setdefault(recipe["name"] if recipe["curve"] else kind, []).append((row["images"], row[score]))
        for name, points in curves.items():
            line = "o-" if name.startswith("1M") else "x"
            axis.plot(*zip(*sorted(points), strict=True), line, label=name, markersize=5)
        axis.set(title=f"{score}, %", xlabel="images seen", xscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labelled images that `datasets` loads, or scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose whole name it matches")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other in a process, on a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which runs are cut off and scored")
    parser.add_argument("--table", action="store_true", help="print what has been found, run nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what has been found, run nothing")
    options = parser.parse_args()
    if options.plot:
        return plot(options.out, options.plot)
    if not options.table:
        if not options.data:
            parser.error("--data is needed: labelled images that `datasets` loads, or scenes")
        deadline = time.time() + options.seconds
        options.out.mkdir(parents=True, exist_ok=True)
        prepare(options.data, options.out / "data")
        ended = [row["recipe"] for row in results(options.out) if row["ended"]]
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        for recipe in recipes(options.data == "scenes"):
            done = json.loads(json.dumps(asdict(recipe))) in ended
            if not done and (not options.only or re.fullmatch(options.only, recipe.name)):
                queue.put(recipe)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        at_once = options.at_once if device == "cuda" else 1
        arguments = (queue, options.out / "data", options.out, device, deadline, at_once)
        workers = [context.Process(target=work, args=arguments) for _ in range(options.processes)]
        for worker in workers:
            for _ in range(at_once):
                queue.put(None)
            worker.start()
        for worker in workers:
            worker.join()
    print(table(options.out))
    if not options.table and (lost := sum(worker.exitcode != 0 for worker in workers)):
        sys.exit(f"{lost} of {len(workers)} processes have failed: see above; the same command does what they left out")


if __name__ == "__main__":
    main()
