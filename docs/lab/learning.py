"""The runs of learning.md: what makes a small I-JEPA learn more. Many at once on one GPU, or one on a CPU.

python docs/lab/learning.py --data /data/tiny-imagenet-100 --out /tmp/learning              the fifth round
python docs/lab/learning.py --data scenes --out /tmp/learning --only "scenes.*" --processes 4
python docs/lab/learning.py --out /tmp/learning --table                                     what has been found so far

--data: labelled images that `datasets` loads, or scenes. Each finished run is a line of OUT/results.jsonl. The same
command goes on with those that are not there. Several processes share a GPU best under CUDA MPS:
nvidia-cuda-mps-control -d
"""

import argparse
import fcntl
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

from dense_loss import Recipe  # noqa: E402
from dense_step import Run  # noqa: E402

from ijepa_scale.data.scenes.prepare import prepare_scenes  # noqa: E402
from ijepa_scale.evals.knn import knn_top1  # noqa: E402
from ijepa_scale.evals.logistic import linear_probe_top1  # noqa: E402

PROBE_IMAGES = 10_000  # to fit on
SCENES, HELD_OUT = 20_000, 4_000
SCORES = ("k-NN", "linear", "RankMe")
ADAMW = {"muon_lr": 0.0, "batch": 128, "ema": (0.99, 1.0), "crop_scale": (0.3, 1.0), "flip": False}
PATCH_4 = {"patch": 4, "batch": 32, "min_keep": 10}
TINY = {"images": 38_400, "variance": 0.02, "covariance": 0.004, "muon_lr": 1e-3, "ema": (0.99, 1.0)}
TINY |= {"crop_scale": (0.3, 1.0), "flip": False}
CALM = {"weight_decay": (0.04, 0.04), "ema": (0.98, 0.98), "final_lr": 1e-3}  # nothing changes after the warm-up

# Longest first, so that no process is left alone with one.
IMAGES: dict[str, dict[str, Any]] = {
    "1M": {"images": 1_024_000},
    "1M, AdamW": {"images": 1_024_000, **ADAMW},
    "256k, patch 4": {"images": 256_000, **PATCH_4},
    "512k": {"images": 512_000},
    "256k": {"images": 256_000},
    "256k, AdamW": {"images": 256_000, **ADAMW},
    "256k, nothing decays": {"images": 256_000, **CALM},
    "256k, nothing decays, w x3": {"images": 256_000, **CALM, "variance": 0.009, "covariance": 0.0018},
    "64k, patch 4": {"images": 64_000, **PATCH_4},
    "seed 0": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "nothing decays": CALM,
    "weight decay 0.04": {"weight_decay": (0.04, 0.04)},
    "ema 0.98": {"ema": (0.98, 0.98)},
    "lr stays": {"final_lr": 1e-3},
    "w x3": {"variance": 0.009, "covariance": 0.0018},
    "w x10": {"variance": 0.03, "covariance": 0.006},
    "w /3": {"variance": 0.001, "covariance": 0.0002},
    "muon 1.2e-3": {"muon_lr": 1.2e-3},
    "muon 5e-3": {"muon_lr": 5e-3},
    "muon 5e-3, w x3": {"muon_lr": 5e-3, "variance": 0.009, "covariance": 0.0018},
    "target norm: none": {"target_norm": "none"},
    "target norm: batch": {"target_norm": "batch"},
    "DynTanh": {"dyn_tanh": 0.5, "target_norm": "none"},
    "DynTanh, then LayerNorm": {"dyn_tanh": 0.5},
    "stochastic positions 0.25": {"stochastic_positions": 0.25},
    "stochastic positions 1": {"stochastic_positions": 1.0},
    "context loss 0.2": {"context_loss": 0.2},
    "context loss 0.5": {"context_loss": 0.5},
    "layers 2, 4, 6, w x3": {"target_layers": (2, 4, 6), "variance": 0.009, "covariance": 0.0018},
    "SIGReg 0.001": {"sigreg": 0.001, "variance": 0.0, "covariance": 0.0},
    "SIGReg 0.005": {"sigreg": 0.005, "variance": 0.0, "covariance": 0.0},
    "4 sets of masks": {"mask_sets": 4, "batch": 16, "images": 32_000},
    "6 small targets": {"target_scale": (0.1, 0.15), "target_blocks": 6},
    "2 large targets": {"target_scale": (0.3, 0.4), "target_blocks": 2},
    "context of 0.5 to 0.7": {"context_scale": (0.5, 0.7)},
    "predictor 6 deep": {"predictor_depth": 6},
    "9 blocks": {"depth": 9},
    "width 256": {"width": 256},
}
ON_SCENES: dict[str, dict[str, Any]] = {
    "scenes: 614k": {**TINY, "images": 614_400, "muon_lr": 2.5e-3},
    "scenes: patch 4": {**TINY, **PATCH_4, "muon_lr": 2.5e-3},
    "scenes: 154k": {**TINY, "images": 153_600, "muon_lr": 2.5e-3},
    "scenes: tiny.yaml": {**TINY, "images": 39_936, "batch": 128},
    "scenes: 64 images a step": TINY,
    "scenes: muon 2.5e-3": {**TINY, "muon_lr": 2.5e-3},
    "scenes: 32 images a step": {**TINY, "muon_lr": 2.5e-3, "batch": 32},
    "scenes: nothing decays": {**TINY, "muon_lr": 2.5e-3, **CALM},
    "scenes: crops of 0.8": {**TINY, "muon_lr": 2.5e-3, "crop_scale": (0.8, 1.0)},
    "scenes: mirrored": {**TINY, "muon_lr": 2.5e-3, "flip": True},
    "scenes: w /3": {**TINY, "muon_lr": 2.5e-3, "variance": 0.007, "covariance": 0.0014},
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
        images = np.stack([_pixels(row["image"]) for row in rows.select_columns(["image"])])
        np.save(cache / f"{name}_images.npy", images)
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
    return found


# --- processes


def work(queue: Any, cache: Path, out: Path, device_name: str, deadline: float) -> None:
    """A process: runs until none is left. What the deadline cuts off is scored as it is, and says so."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    data = load(cache, torch.device(device_name))
    while time.time() < deadline and (recipe := queue.get()) is not None:
        torch.manual_seed(recipe.seed)
        started = time.time()
        run = Run(recipe, data["train_images"])
        while run.done < recipe.steps and time.time() < deadline:
            run.train(min(recipe.steps, run.done + (50 if device_name == "cuda" else 1)))  # between looks at the clock
        took = time.time() - started
        found = {"steps": run.done, "images": run.done * recipe.batch, "seconds": took, "loss": float(run.last_loss)}
        found["ended"] = run.done == recipe.steps
        if np.isfinite(found["loss"]):
            found |= score(run, data)
        with open(out / "results.jsonl", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps({**found, "recipe": asdict(recipe)}) + "\n")
        print(f"{recipe.name}: {took:.0f} s, {in_words(found)}", flush=True)


def in_words(found: dict[str, Any]) -> str:
    scores = {name: value for name, value in found.items() if name.startswith(SCORES)}
    return ", ".join(f"{name} {value:.1f}" for name, value in scores.items()) or "the loss is not finite"


def results(out: Path) -> Iterator[dict[str, Any]]:
    path = out / "results.jsonl"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labelled images that `datasets` loads, or scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose whole name it matches")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which runs are cut off and scored")
    parser.add_argument("--table", action="store_true", help="print what has been found, run nothing")
    options = parser.parse_args()
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
        arguments = (queue, options.out / "data", options.out, device, deadline)
        workers = [context.Process(target=work, args=arguments) for _ in range(options.processes)]
        for worker in workers:
            queue.put(None)
            worker.start()
        for worker in workers:
            worker.join()
    print(table(options.out))


if __name__ == "__main__":
    main()
