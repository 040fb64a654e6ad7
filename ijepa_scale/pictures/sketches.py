"""What the predictor imagines in a box, drawn: by a decoder, and in several ways by a flow (launch/train_sketch.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.build_objectives import build_sketch
from ijepa_scale.config import SketchConfig
from ijepa_scale.engine.distributed import alone
from ijepa_scale.exchange.run import find_checkpoint, read_network
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.objectives.ijepa import IJepa
from ijepa_scale.pictures.subject import Checkpoint, Images
from ijepa_scale.visualize import predictions, sketches
from ijepa_scale.visualize.sheet import Box, Cell, describe, draw_sheet, upright

DECODED = (  # over the columns
    "box that is\nnot seen",
    "drawn from the\ntrue features",
    "drawn from the\nprediction",
    "from the mean\nof others",
    "predicted from\nother image",
)
FOLDERS = {"decoder": "sketch", "flow": "sketch-flow"}  # of kinds of sketches, in an encoder's run
RETRIEVED = 64  # images among which a sample is to be nearest to the one that it was drawn for


@dataclass(frozen=True)
class Drawer:
    """A trained sketch. path: of its checkpoint. layer: the block whose features it draws, from 1."""

    network: Any
    path: Path
    layer: int
    options: SketchConfig


@dataclass(frozen=True)
class Hidden:
    """Images with a box each that is hidden, and features of its patches, each (B, K, D): by what they are.

    around: features of the other patches, by the context encoder, (B, N - K, D).
    """

    pixels: np.ndarray
    boxes: list[Box]
    blocks: np.ndarray
    grid: PatchGrid
    around: np.ndarray
    inside: dict[str, np.ndarray]

    def filled(self, name: str) -> np.ndarray:
        return sketches.filled(self.around, self.inside[name], self.blocks)

    def pasted(self, drawn_BCHW: np.ndarray) -> np.ndarray:
        """The images with the pixels of others in their boxes, (B, H, W, 3) uint8."""
        inside = np.zeros((len(self.blocks), self.grid.num_patches), dtype=bool)
        np.put_along_axis(inside, self.blocks, True, axis=1)
        tall, wide = (side // of for side, of in zip(self.pixels.shape[2:], self.grid.shape, strict=True))
        pixels = inside.reshape(-1, 1, *self.grid.shape).repeat(tall, axis=2).repeat(wide, axis=3)
        count = len(drawn_BCHW)
        return upright(np.where(pixels[:count], drawn_BCHW, self.pixels[:count]))


def found_sketches(checkpoint: Checkpoint, given: dict[str, str]) -> dict[str, Path]:
    """Folders of what draws sketches of a checkpoint, by its kind: those given, else those in its run."""
    found = {}
    for kind, name in FOLDERS.items():
        if given.get(kind):
            found[kind] = Path(given[kind])
        elif checkpoint.run and (checkpoint.run / name / "checkpoints").is_dir():
            found[kind] = checkpoint.run / name
    return found


def why_not(checkpoint: Checkpoint, given: dict[str, str]) -> str:
    """Why nothing draws sketches of it; "" where something does. given: as of found_sketches()."""
    try:
        read_drawers(checkpoint, given)
    except ValueError as error:
        return str(error)
    return ""


def read_drawers(
    checkpoint: Checkpoint, given: dict[str, str], say: Callable[[str], None] = lambda text: None
) -> dict[str, Drawer]:
    """What draws sketches, by its kind. Who lies in the run and does not fit is left out, and say() hears why.

    Raises ValueError where one that was given does not fit, or where nothing is left.
    """
    drawers, reasons = {}, []
    for kind, path in found_sketches(checkpoint, given).items():
        try:
            drawers[kind] = read_drawer(path, kind, checkpoint)
        except ValueError as error:
            if given.get(kind):
                raise
            reasons.append(str(error))
    if not drawers:
        path = checkpoint.networks.path
        none = f"nothing draws sketches of {path} yet: train a decoder by launch/train_sketch.py --checkpoint {path}"
        raise ValueError("; ".join(reasons) or none)
    for reason in reasons:
        say(f"left out: {reason}")
    return drawers


def read_drawer(path: Path, kind: str, checkpoint: Checkpoint) -> Drawer:
    """A trained sketch of this encoder. Raises ValueError where it is of another, or of another kind."""
    found, notes = find_checkpoint(path)
    for note in notes:
        print(note, flush=True)
    if found.manifest.get("objective") != "sketch":
        raise ValueError(f"{path} is no sketch but {found.manifest.get('objective')}: train one with train_sketch")
    network, config = read_network(found, "decoder")
    if config.sketch.kind != kind:
        raise ValueError(f"{path} is a {config.sketch.kind}; give it as --{config.sketch.kind}")
    of = found.manifest["frozen"]
    if of["sha256"] != checkpoint.loaded.sha256:
        raise ValueError(
            f"{path} draws features of another encoder, {of['path']}: give that as --checkpoint, or train one anew "
            "with another run_dir"
        )
    network.to(alone().device).eval()
    return Drawer(network, found.path, build_sketch(config).layers[-1], config.sketch)


def draw_sketches(
    checkpoint: Checkpoint,
    images: Images,
    given: dict[str, str],
    boxes: list[Box],
    *,
    out: Path,
    count: int,
    samples: int,
) -> list[str]:
    """A sheet of what each trained sketch draws. given: as of found_sketches(). samples: of a flow, a box."""
    drawers = read_drawers(checkpoint, given, lambda text: print(text, flush=True))
    model, hidden, step, drawn = checkpoint.model(), dict[int, Hidden](), checkpoint.loaded.step, []
    for kind, drawer in drawers.items():
        if drawer.layer not in hidden:
            hidden[drawer.layer] = hide(model, images, boxes, drawer.layer)
        about = (hidden[drawer.layer], images, step, out, count)
        drawn.append(
            draw_decoded(drawer, model, *about) if kind == "decoder" else draw_samples(drawer, *about, samples)
        )
    return drawn


def hide(model: IJepa, images: Images, boxes: list[Box], layer: int) -> Hidden:
    pixels, grid = images.pixels, model.target_encoder.grid
    blocks = np.stack([grid.block(*box) for box in boxes])
    targets = sketches.true_features(model.target_encoder, pixels, layer)

    def predicted(seen: np.ndarray) -> np.ndarray:
        return sketches.of_layer(predictions.predictions(model, seen, blocks), model.target_layers, layer)

    return Hidden(
        pixels=pixels,
        boxes=boxes,
        blocks=blocks,
        grid=grid,
        around=sketches.features_around(model.context_encoder, pixels, blocks, layer),
        inside={
            "truth": predictions.in_blocks(targets, blocks),
            "prediction": predicted(pixels),
            "mean of others": predictions.mean_features(targets, blocks),
            "other image": predicted(np.roll(pixels, 1, axis=0)),
        },
    )


@dataclass(frozen=True)
class Decoded:
    """A decoder's images, (B, 3, H, W), by what the features in the box are: "truth" (of all patches) and hide()'s.

    off: mean absolute errors of pixels in the box, in percent of their range, (B, K). like: there, cosines of the
    target encoder's features of what is drawn with those of the image, (B, K). own: in percent, for how many of the
    first RETRIEVED images what is drawn of the true features is nearer, in pixels, to its own than to any of these.
    """

    drawn: dict[str, np.ndarray]
    off: dict[str, np.ndarray]
    like: dict[str, np.ndarray]
    own: float


def decode(drawer: Drawer, model: IJepa, hidden: Hidden) -> Decoded:
    grid, blocks, encoder = hidden.grid, hidden.blocks, model.target_encoder
    truth = sketches.true_features(encoder, hidden.pixels, drawer.layer)
    drawn = {"truth": sketches.decoded(drawer.network, truth, grid)}
    drawn |= {name: sketches.decoded(drawer.network, hidden.filled(name), grid) for name in list(hidden.inside)[1:]}
    off = {name: sketches.pixel_errors(pixels, hidden.pixels, blocks, grid) for name, pixels in drawn.items()}

    def likeness(pixels: np.ndarray) -> np.ndarray:
        found = sketches.true_features(encoder, pixels, drawer.layer)
        return predictions.cosines(*(predictions.in_blocks(features, blocks) for features in (found, truth)))

    like = {name: likeness(pixels) for name, pixels in drawn.items()}
    images = hidden.pixels[:RETRIEVED].astype(np.float32)
    nearest = [np.abs(images - one).mean(axis=(1, 2, 3)).argmin() for one in drawn["truth"][:RETRIEVED]]
    return Decoded(drawn, off, like, 100 * float(np.mean(nearest == np.arange(len(images)))))


def draw_decoded(
    drawer: Drawer, model: IJepa, hidden: Hidden, images: Images, step: int | None, out: Path, count: int
) -> str:
    """The sheet of a decoder, with errors inside the box over all images."""
    path, found = out / "sketches.png", decode(drawer, model, hidden)
    said = (
        f"of {len(hidden.pixels[:RETRIEVED])} drawn from the truth, {found.own:.0f}% are nearest to their own. "
        f"Error of pixels in the box: {in_words(found.off, '%')}. "
        f"Cosine of features of what is drawn: {in_words(found.like)}"
    )
    print(f"sketch: {drawer.path}, {len(hidden.pixels):,} images; {said}", flush=True)
    shown = upright(hidden.pixels)
    rows = []
    for image in range(min(count, len(shown))):
        row = [Cell(shown[image], box=hidden.boxes[image])]
        for name, pixels in found.drawn.items():
            text = f"{found.off[name][image].mean():.0f}% off"
            row.append(Cell(upright(pixels)[image], box=hidden.boxes[image], text=text))
        rows.append(row)
    draw_sheet(path, rows, hidden.grid, headings=dict(enumerate(DECODED)), gap_before=2, side=1.2)
    describe(
        path,
        title="What the predictor imagines in the box",
        caption="A decoder draws images from features. From the true ones it shows what it can do. In the other "
        "columns the box is not seen: around it are the context encoder's features, and in it those that are "
        f"predicted, or two guesses. Over {len(hidden.pixels):,} images of {images.source.name}, ± one standard error: "
        f"{said}.",
        alt=f"{len(rows)} images with a box, and decoded images of them, from true and from predicted features.",
        section="sketches",
        step=step,
    )
    return path.name


def in_words(values: dict[str, np.ndarray], unit: str = "") -> str:
    """Means and errors over images, and how the prediction compares with each guess."""
    means = {name: predictions.mean_and_error(one) for name, one in values.items()}
    said = [f"{name} {mean:.3g}{unit} ±{error:.2g}" for name, (mean, error) in means.items()]
    for guess in ("mean of others", "other image"):
        gain, error = predictions.mean_and_error(values["prediction"] - values[guess])
        said.append(f"prediction less {guess} {gain:+.2g} ±{error:.2g}")
    return "; ".join(said)


def draw_samples(
    drawer: Drawer, hidden: Hidden, images: Images, step: int | None, out: Path, count: int, each: int
) -> str:
    """The sheet of a flow: several samples a box, and how well a sample tells which image it was drawn for."""
    path, count = out / "samples.png", min(count, len(hidden.pixels))
    condition, grid = drawer.options.condition, hidden.grid
    numbers = {"truth": min(2, each), "prediction": each, "mean of others": min(2, each)}
    shown = upright(hidden.pixels)
    rows = [[Cell(shown[image], box=hidden.boxes[image])] for image in range(count)]
    headings, column = {0: "box that is\nnot seen"}, 1
    words = {"truth": "true features", "prediction": "the prediction", "mean of others": "mean of others"}
    for name, number in numbers.items():
        headings[column] = f"samples of the\n{words[name]}" if name == "truth" else f"samples of\n{words[name]}"
        for sample in range(number):
            drawn = sketches.samples(
                drawer.network,
                hidden.inside[name][:count],
                hidden.blocks[:count],
                grid,
                condition=condition,
                predicted=name != "truth",
                seeds=[1000 * image + sample for image in range(count)],
            )
            for image, pixels in enumerate(hidden.pasted(drawn)):
                rows[image].append(Cell(pixels, box=hidden.boxes[image]))
        column += number
    told = {name: told_apart(drawer, hidden, name) for name in ("truth", "prediction")}
    among = min(RETRIEVED, len(hidden.pixels))
    said = "; ".join(f"{name} {share:.1f}% ±{error:.1f}" for name, (share, error) in told.items())
    said = f"a sample's box is nearest, in pixels, to that of its own image among {among}: {said}; "
    said += f"chance {100 / among:.1f}%"
    print(f"sketch: {drawer.path}, condition {condition}; {said}", flush=True)
    draw_sheet(path, rows, grid, headings=headings, gap_before=1, side=1.0)
    describe(
        path,
        title="Several sketches of what is in the box",
        caption="A flow draws images from the features in the box alone: it sees nothing around it. What all samples "
        "of a row share is what these features say; where they differ, they say nothing. Only the box is drawn: "
        f"around it is the image. Given: {'each feature' if condition == 'tokens' else 'the mean of the features'}. Of "
        f"{images.source.name}: {said}.",
        alt=f"{count} images with a box, and samples of its content, by true, predicted and mean features.",
        section="sketches",
        step=step,
    )
    return path.name


def told_apart(drawer: Drawer, hidden: Hidden, name: str) -> tuple[float, float]:
    """In percent, for how many images the sample's box is nearest to their own box's content; and the standard error.

    The same box of all, that of the first image's size in the middle, would need features anew: here each image's own
    box is compared with the same place of every other image.
    """
    count = min(RETRIEVED, len(hidden.pixels))
    drawn = sketches.samples(
        drawer.network,
        hidden.inside[name][:count],
        hidden.blocks[:count],
        hidden.grid,
        condition=drawer.options.condition,
        predicted=name != "truth",
        seeds=range(count),
    )
    hits = []
    for image in range(count):
        block = np.repeat(hidden.blocks[image : image + 1], count, axis=0)
        repeated = np.repeat(drawn[image : image + 1], count, axis=0)
        off = sketches.pixel_errors(repeated, hidden.pixels[:count], block, hidden.grid).mean(axis=1)
        hits.append(float(off.argmin() == image))
    share = float(np.mean(hits))
    return 100 * share, 100 * float(np.sqrt(share * (1 - share) / count))
