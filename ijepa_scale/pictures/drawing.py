"""The pictures, one function each: computed and drawn by visualize/, with the words that go beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale import build
from ijepa_scale.data.order import BLOCKS, SIZES, generator_for
from ijepa_scale.evals.embed import Embeddings, Query
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import block_sizes, expected_shares, place_blocks
from ijepa_scale.objectives.masks import BlockMasks
from ijepa_scale.pictures.sketches import draw_sketches
from ijepa_scale.pictures.subject import Checkpoint, Images, drawn_boxes
from ijepa_scale.visualize import features, predictions
from ijepa_scale.visualize.masks import MAX_IMAGES, draw_mask_shares, draw_masks
from ijepa_scale.visualize.neighbours import draw_neighbours, look_up, nearest_patches
from ijepa_scale.visualize.sheet import Bar, Box, Cell, describe, draw_sheet, upright

NEAREST = 8  # neighbours of a query
LAYOUTS = 2000  # whose masks are counted
PREDICTED = (  # over the columns
    "box that is\nnot seen",
    "cosine of the\nprediction",
    "cosine of the\nmean of others",
    "cosine, predicted\nfrom other image",
    "patches nearest\nto prediction",
    "patches nearest\nto the mean",
    "patches nearest\nto the truth",
)


@dataclass
class Series:
    """The checkpoint before in a series of them, newest first: its step, and the scores of its colours by block."""

    step: int = 0
    scores: list[np.ndarray] = field(default_factory=list)

    def turn(self, step: int, scores: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
        """A checkpoint's scores turned to those of the one before, and how, in words; the next one's turn to these."""
        said = " Colours of earlier checkpoints are turned to these."
        if self.scores:
            pairs = [features.turned(own, others) for own, others in zip(scores, self.scores, strict=True)]
            scores, near = [own for own, _ in pairs], ", ".join(f"{correlation:.2f}" for _, correlation in pairs)
            said = (
                " Those of the trained network are turned, all of a block as one, to be like those of step "
                f"{self.step:,}: the correlation with these is {near}, from the first row on."
            )
        self.step, self.scores = step, scores
        return scores, said


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of the verb, which says what each means (verbs/visualize.py). layers, patch: as indices.

    series: where pictures are of one checkpoint after another.
    """

    out: Path
    count: int
    seed: int
    size: int
    layers: list[int]
    foreground: float | None
    raw: bool
    queries: list[str]
    patch: int | None
    box: Box | None
    drawers: dict[str, str]  # folders of trained sketches by kind, where they are given
    samples: int
    series: Series | None = None

    def path(self, name: str, checkpoint: Checkpoint) -> Path:
        return self.out / (f"{name}-checkpoint-{checkpoint.step:08d}.png" if self.series else f"{name}.png")

    def describe(self, path: Path, checkpoint: Checkpoint, *, title: str, caption: str, alt: str, section: str) -> str:
        """The words beside a picture; its name."""
        title += ", over checkpoints" if self.series else ""
        describe(path, title=title, caption=caption, alt=alt, section=section, step=checkpoint.loaded.step)
        return path.name


def draw_masks_of(checkpoint: Checkpoint, images: Images, asked: Asked) -> list[str]:
    assert checkpoint.config is not None
    objective = build.build_objective(checkpoint.config)
    count = min(MAX_IMAGES, asked.count, len(images.pixels))
    shown = objective.shown(objective.draw_masks(0, range(count)))
    path, grid = asked.path("masks", checkpoint), objective.grid
    draw_masks(path, images.pixels[:count], *grid.shape, [one.seen for one in shown], [one.hidden for one in shown])
    asked.describe(
        path,
        checkpoint,
        title="What the networks see",
        caption=f"Masks of {objective.name}, drawn as in training, on {images.source.name}.",
        alt=f"{count} images, each with the patches that the encoder sees and those that are predicted.",
        section="masks",
    )
    if not isinstance(objective.draw_masks, BlockMasks):
        return [path.name]
    return [path.name, draw_shares(checkpoint, objective.draw_masks, asked)]


def draw_shares(checkpoint: Checkpoint, draw: BlockMasks, asked: Asked) -> str:
    blocks, grid, path = draw.blocks, draw.blocks.grid, asked.path("mask_shares", checkpoint)
    counted, free, again = np.zeros((2, grid.num_patches)), replace(blocks, min_keep=0), 0
    for step in range(LAYOUTS):  # one image of each: all of a step have blocks of the same sizes
        sizes = block_sizes(blocks, generator_for(asked.seed, SIZES, step))
        rng = generator_for(asked.seed, BLOCKS, step, 0)
        placed = place_blocks(free, sizes, rng)
        if placed.context.size < blocks.min_keep:
            placed, again = place_blocks(blocks, sizes, rng), again + 1
        counted[0, placed.context] += 1
        counted[1, np.unique(placed.target_blocks)] += 1
    drawn, expected = (counted / LAYOUTS).reshape(2, *grid.shape), np.stack(expected_shares(blocks))
    draw_mask_shares(path, ("context", "target"), list(drawn), list(expected))
    off, error = np.abs(drawn - expected).max(), np.sqrt(expected * (1 - expected) / LAYOUTS).max()
    said = f"They differ by at most {100 * off:.1f}% of layouts; a patch's standard error is up to {100 * error:.1f}%."
    print(f"masks: drawn and expected shares. {said}")
    if again:
        said += (
            f" {again} kept fewer than {blocks.min_keep} context patches and were drawn again, which is not expected."
        )
    if draw.context != "all":
        said += f" Context is counted before mask.context={draw.context} takes some of it away."
    asked.describe(
        path,
        checkpoint,
        title="How often each patch is seen and predicted",
        caption=f"Drawn: {LAYOUTS:,} layouts. Expected: exactly, over all sizes and places of blocks. {said}",
        alt=f"Heat maps on a grid of {grid.rows} x {grid.columns} patches: shares of layouts in which a patch is "
        "context, and in which it is in a target block, as drawn, as expected, and the difference.",
        section="masks",
    )
    return path.name


@dataclass(frozen=True)
class Sides:
    """The same images by the trained network and by the one that training started from. words: what is looked at."""

    pixels: np.ndarray
    grid: PatchGrid
    encoders: tuple[Any, Any]
    headings: tuple[str, str]
    words: str

    def describe(self, path: Path, checkpoint: Checkpoint, asked: Asked, *, title: str, caption: str, alt: str) -> str:
        caption, alt = f"{caption} {self.words}", f"{alt} To the left the trained network, to the right the untrained."
        return asked.describe(path, checkpoint, title=title, caption=caption, alt=alt, section="features")


def draw_features_of(checkpoint: Checkpoint, images: Images, asked: Asked) -> list[str]:
    pixels, (initial, began) = images.at_size(asked.size, asked.count), checkpoint.initial
    sides = Sides(
        pixels,
        checkpoint.grid(asked.size),
        (checkpoint.encoder, initial),
        (checkpoint.trained, "before training"),
        f"{len(pixels)} images of {images.source.name}, {asked.size} pixels a side. Before training: {began}.",
    )
    layers, less = [features.patch_features(encoder, pixels, asked.layers) for encoder in sides.encoders], ""
    if not asked.raw:  # else positions are nearly all that one sees
        everything = images.at_size(asked.size, len(images.indices))
        means = [features.place_means(encoder, everything, asked.layers) for encoder in sides.encoders]
        layers = [[one - mean for one, mean in zip(*side, strict=True)] for side in zip(layers, means, strict=True)]
        less = f" Features are less the mean at each place, over {len(everything):,} images."
    rows = [(f"block {block}", *pair) for block, pair in zip(asked.layers, zip(*layers, strict=True), strict=True)]
    drawn = [draw(sides, rows, less, checkpoint, asked) for draw in (draw_colours, draw_similarity)]
    return [*drawn, draw_attention(sides, checkpoint, asked)]


def draw_colours(sides: Sides, rows: list, less: str, checkpoint: Checkpoint, asked: Asked) -> str:
    path, threshold = asked.path("features", checkpoint), asked.foreground
    trained, before = ([features.pca_scores(row[side], threshold) for row in rows] for side in (1, 2))
    trained, said = asked.series.turn(checkpoint.step, trained) if asked.series else (trained, "")
    shown = [(row[0], *map(features.colours, pair)) for row, *pair in zip(rows, trained, before, strict=True)]
    features.draw_beside(path, sides.pixels, shown, sides.grid, headings=sides.headings)
    grey = "" if threshold is None else f" Grey: not beyond {threshold:g} along the first component of all patches."
    return sides.describe(
        path,
        checkpoint,
        asked,
        title="Patch features in colours",
        caption="The first three principal components of the patches' features as red, green and blue. One PCA is of "
        f"all images, for each block and each network: within these like colours are like features.{said}{grey}{less}",
        alt="Images, and below each its patches in the colours of their features, a row for each of some blocks.",
    )


def draw_similarity(sides: Sides, rows: list, less: str, checkpoint: Checkpoint, asked: Asked) -> str:
    path, count = asked.path("similarity", checkpoint), len(sides.pixels)
    busiest = features.busiest_patches(sides.pixels, sides.grid)
    marked = busiest if asked.patch is None else np.full(count, asked.patch)
    maps = [(label, *(features.similarity(side, marked) for side in pair)) for label, *pair in rows]
    headings, bar = sides.headings, features.SIMILARITY
    features.draw_beside(path, sides.pixels, maps, sides.grid, headings=headings, marked=marked, bar=bar)
    return sides.describe(
        path,
        checkpoint,
        asked,
        title="Which patches are like the marked one",
        caption="Cosine between the features of the marked patch and of every patch of its image, each less the "
        f"mean of those shown.{less}",
        alt="Images with a marked patch, and below each heat maps of the similarity to it, for some blocks.",
    )


def draw_attention(sides: Sides, checkpoint: Checkpoint, asked: Asked) -> str:
    path, block, patch = asked.path("attention", checkpoint), asked.layers[-1], asked.patch
    weights = [features.attention_weights(encoder, sides.pixels, block) for encoder in sides.encoders]
    maps = [features.attention_maps(side, patch).swapaxes(0, 1) for side in weights]
    rows = [(f"head {head}", *pair) for head, pair in enumerate(zip(*maps, strict=True))]
    bar = Bar("attention, in multiples of an even one", 0, float(np.percentile(maps, 99.5)), "magma")
    marked = None if patch is None else np.full(len(sides.pixels), patch)
    features.draw_beside(path, sides.pixels, rows, sides.grid, headings=sides.headings, marked=marked, bar=bar)
    whose = "all patches, on average," if patch is None else "the marked patch"
    return sides.describe(
        path,
        checkpoint,
        asked,
        title=f"What the heads of block {block} attend to",
        caption=f"Attention from {whose} to each patch. 1 is what each would get of an even one. "
        "There is no class token.",
        alt="Images, and below each heat maps of the attention of each head.",
    )


def draw_neighbours_of(checkpoint: Checkpoint, images: Images, asked: Asked) -> list[str]:
    """Of images by the same code as the verb neighbours, which looks in a folder of embeddings; and of patches."""
    path = asked.path("neighbours", checkpoint)
    (of_patches,) = features.patch_features(checkpoint.encoder, images.pixels, [-1])
    names = [{"index": str(index), "image": images.source.sample_id(index)} for index in images.indices]
    embeddings = Embeddings(of_patches.mean(axis=1), names, {"image_size": checkpoint.loaded.image_size})
    given = embeddings.file_queries(asked.queries, checkpoint.encoder)
    queries = list(given if asked.queries else embeddings.own_queries(images.source))
    queries = [replace(query, row=embeddings.row_of(query)) for query in queries]
    draw_neighbours(path, look_up(embeddings, images.source, queries, NEAREST))
    asked.describe(
        path,
        checkpoint,
        title="The nearest images",
        caption="Beside each framed image those whose mean features are nearest, with the cosine (of features less the "
        f"mean of all). Looked for among {images.words}.",
        alt=f"{len(queries)} rows: an image, and the {NEAREST} nearest to it.",
        section="neighbours",
    )
    return [path.name, draw_patch_neighbours(checkpoint, images, queries, of_patches, asked)]


def draw_patch_neighbours(
    checkpoint: Checkpoint, images: Images, queries: list[Query], features_BND: np.ndarray, asked: Asked
) -> str:
    pixels, grid, path = (
        np.stack([query.pixels for query in queries]),
        checkpoint.grid(),
        asked.path("patches", checkpoint),
    )
    busiest = features.busiest_patches(pixels, grid)
    patches = busiest if asked.patch is None else np.full(len(queries), asked.patch)
    (asking,) = features.patch_features(checkpoint.encoder, pixels, [-1])
    own = np.array([query.row for query in queries])
    found, cosines = nearest_patches(asking[np.arange(len(queries)), patches], own, features_BND, NEAREST)
    shown, cells = upright(images.pixels), []
    for place, image in enumerate(upright(pixels)):
        near = [Cell(image, box=features.patch_box(patches[place], grid), text="query")]
        for patch, cosine in zip(found[place].tolist(), cosines[place], strict=True):
            source, there = divmod(patch, grid.num_patches)
            near.append(Cell(shown[source], box=features.patch_box(there, grid), text=f"{cosine:.2f}"))
        cells.append(near)
    draw_sheet(path, cells, grid, headings={0: "patch", 1: "nearest patches of other images"}, gap_before=1)
    asked.describe(
        path,
        checkpoint,
        title="The nearest patches",
        caption="Beside each marked patch those of other images whose features are nearest, with the cosine (of "
        f"features less the mean of all). Looked for among {images.words}.",
        alt=f"{len(queries)} rows: an image with a marked patch, and {NEAREST} images with the patches nearest to it.",
        section="neighbours",
    )
    return path.name


def draw_predictions_of(checkpoint: Checkpoint, images: Images, asked: Asked) -> list[str]:
    pixels, grid, model, path = (
        images.pixels,
        checkpoint.grid(),
        checkpoint.model(),
        asked.path("predictions", checkpoint),
    )
    boxes = [asked.box] * len(pixels) if asked.box else drawn_boxes(checkpoint, len(pixels), asked.seed)
    blocks = np.stack([grid.block(*box) for box in boxes])
    targets = predictions.target_features(model, pixels)
    truth = predictions.in_blocks(targets, blocks)
    said = {
        "prediction": predictions.predictions(model, pixels, blocks),
        "mean of others": predictions.mean_features(targets, blocks),
        "other image": predictions.predictions(model, np.roll(pixels, 1, axis=0), blocks),
    }
    cosines = {name: predictions.cosines(vectors, truth) for name, vectors in said.items()}
    figures = "; ".join(predictions.compared(cosines))
    print(f"predict: mean cosine with the true features over {len(pixels):,} images: {figures}", flush=True)

    count, shown = min(asked.count, len(pixels)), upright(pixels)
    cells, own = [[Cell(shown[i], box=boxes[i])] for i in range(count)], np.repeat(np.arange(count), blocks.shape[1])
    for values in cosines.values():
        for i, row in enumerate(cells):
            heat = predictions.over_grid(values[i], blocks[i], grid)
            row.append(Cell(shown[i], heat, boxes[i], f"mean {values[i].mean():.2f}"))
    for vectors in (said["prediction"], said["mean of others"], truth):
        found, _ = nearest_patches(vectors[:count].reshape(len(own), -1), own, targets, 1)
        for i, (row, patches) in enumerate(zip(cells, found.reshape(count, -1), strict=True)):
            row.append(Cell(predictions.pasted(i, blocks[i], pixels, patches, grid), box=boxes[i]))
    lowest = float(np.percentile([values[:count] for values in cosines.values()], 2))
    bar = Bar("cosine with the true target features", min(lowest, 0.9), 1.0)
    draw_sheet(path, cells, grid, headings=dict(enumerate(PREDICTED)), gap_before=4, bar=bar, side=1.05)
    asked.describe(
        path,
        checkpoint,
        title="What the predictor says of a box that it does not see",
        caption=f"Mean cosine with the target encoder's features over {len(pixels):,} images of {images.source.name}, "
        f"with standard errors: {figures}. To the right the box is filled with real patches of other images, "
        "those that are nearest to each feature: nearest to the truth is the best that this can do.",
        alt=f"{count} images with a box: heat maps of three cosines in it, then the box filled with patches of others.",
        section="predictions",
    )
    return [path.name]


def draw_sketches_of(checkpoint: Checkpoint, images: Images, asked: Asked) -> list[str]:
    count = len(images.pixels)
    boxes = [asked.box] * count if asked.box else drawn_boxes(checkpoint, count, asked.seed)
    options: Any = {"out": asked.out, "count": min(asked.count, count), "samples": asked.samples}
    return draw_sketches(checkpoint, images, asked.drawers, boxes, **options)


DRAWN: dict[str, Callable[[Checkpoint, Images, Asked], list[str]]] = {
    "masks": draw_masks_of,
    "features": draw_features_of,
    "neighbours": draw_neighbours_of,
    "predict": draw_predictions_of,
    "sketch": draw_sketches_of,
}
