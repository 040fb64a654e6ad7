"""Pictures of what an encoder has learned: features, attention, neighbours, predictions, and the masks.

python launch/visualize.py all --checkpoint runs/tiny
python launch/visualize.py features --checkpoint runs/tiny --images /data/my_images --size 128 --out pictures
python launch/visualize.py predict --checkpoint runs/tiny --box 2,3,4,3
python launch/visualize.py features --checkpoint runs/tiny --steps all       of every checkpoint that the run has kept

WHAT is one of these, or all, for those that the checkpoint allows:
{pictures}

Writes PNGs to --out, and beside each a NAME.json with its title, caption and alternative text. The images are those of
the run's validation split, or of --images; as many as --among are looked at, and --count of them shown.
docs/visualize.md says how to read them. Exit codes: 0 done, 2 wrong input.
"""

import argparse
import time
from typing import TYPE_CHECKING

from ijepa_scale.verbs import fail, parser_of

if TYPE_CHECKING:
    from ijepa_scale.pictures.subject import Checkpoint

PICTURES = {
    "masks": "what the networks see, and how often each patch is seen and predicted",
    "features": "patches in the colours of their features, similarity, attention; beside the untrained network",
    "neighbours": "the nearest images, and the nearest patches",
    "predict": "how near the predictor comes to the features of a box that it does not see (ijepa alone)",
    "sketch": "what it imagines in the box, drawn by a decoder and a flow of launch/train_sketch.py (ijepa alone)",
}


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12}{what}" for name, what in PICTURES.items())
    parser = parser_of("visualize", (__doc__ or "").format(pictures=listed))
    parser.add_argument("what", metavar="WHAT", choices=[*PICTURES, "all"], help="see above")
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a run, a checkpoint, or others of docs/export.md"
    )
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="STEP", help="all, or some: a picture of each checkpoint that the "
        "run has kept, for a slider on its page (default: the newest alone)",
    )  # fmt: skip
    parser.add_argument("--images", default="", metavar="SOURCE", help="a folder or another source, or scenes")
    parser.add_argument("--split", default="", help="of the source (default: validation or test, else its only one)")
    parser.add_argument("--out", default="", metavar="DIR", help="default: pictures/ of the run")
    parser.add_argument("--count", type=int, default=6, help="images shown (default: 6)")
    parser.add_argument("--among", type=int, default=256, help="images looked at (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and boxes (default: 0)")
    parser.add_argument("--cache-dir", default="", help="as data.cache_dir (default: the run's)")
    parser.add_argument(
        "--patch", default="", metavar="ROW,COL", help="whose similarity, attention and neighbours are shown (default: "
        "of each image the one whose pixels vary most, and the average attention)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N", help="of features: blocks from 0, or from the end "
        "with -1; attention is of the last named (default: four, evenly)",
    )  # fmt: skip
    parser.add_argument(
        "--foreground", type=float, metavar="T", help="of features: colour only patches whose first component, from 0 "
        "to 1, is above T; with -T below T (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true", help="of features: leave in what all images have at a place (default: their mean "
        "at each place is taken away, else one sees positions above all)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=0, help="of features: pixels a side (default: as trained)")
    parser.add_argument("--query", nargs="+", default=[], metavar="IMAGE", help="of neighbours: image files to look up")
    parser.add_argument(
        "--box",
        default="",
        metavar="ROW,COL,HEIGHT,WIDTH",
        help="of predict and sketch: in patches (default: one an image, drawn)",
    )
    parser.add_argument("--decoder", default="", metavar="RUN", help="of sketch (default: RUN/sketch)")
    parser.add_argument("--flow", default="", metavar="RUN", help="of sketch (default: RUN/sketch-flow)")
    parser.add_argument("--samples", type=int, default=4, help="of sketch: of a flow, for each box (default: 4)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        visualize(options)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    return 0


def visualize(options: argparse.Namespace) -> None:
    """Open the checkpoints and the images, draw what is asked for, and say where it is."""
    check_numbers(options)
    from ijepa_scale.pictures.choices import box_of, patch_of
    from ijepa_scale.pictures.drawing import DRAWN, Asked, Series
    from ijepa_scale.pictures.subject import checkpoints_at, open_checkpoint, open_images_of

    drawers = {"decoder": options.decoder, "flow": options.flow}
    paths = checkpoints_at(options.checkpoint, options.steps) if options.steps else [options.checkpoint]
    images, series = None, Series() if options.steps else None
    for path in paths:
        checkpoint = open_checkpoint(path)
        chosen = list(PICTURES) if options.what == "all" else [options.what]
        reasons = {what: reason for what in chosen if (reason := why_not(what, checkpoint, options.steps, drawers))}
        if reasons and options.what != "all":
            raise ValueError(reasons[options.what])
        asked = Asked(
            out=checkpoint.folder(options.out),
            count=options.count,
            seed=options.seed,
            size=checkpoint.size(options.size),
            layers=checkpoint.layers(options.layers),
            foreground=options.foreground,
            raw=options.raw,
            queries=options.query,
            patch=patch_of(options.patch, checkpoint.grid(options.size)),
            box=box_of(options.box, checkpoint.grid()),
            drawers=drawers,
            samples=options.samples,
            series=series,
        )
        if images is None:  # those of a run's checkpoints are the same
            for what, reason in reasons.items():
                print(f"left out: {what}: {reason}")
            images = open_images_of(
                checkpoint, options.images, options.split, options.cache_dir, among=options.among, seed=options.seed
            )
        print(f"{checkpoint.loaded.path}, the {checkpoint.loaded.name} encoder, on {images.words}", flush=True)
        for what in chosen:
            if what not in reasons:
                started = time.monotonic()
                made = DRAWN[what](checkpoint, images, asked)
                print(f"{what}: {asked.out}/{', '.join(made)} ({time.monotonic() - started:.0f} s)", flush=True)


def why_not(what: str, checkpoint: "Checkpoint", steps: list[str], drawers: dict[str, str]) -> str:
    """Why there is no such picture; "" where there is."""
    from ijepa_scale.pictures import sketches

    if what == "masks" and steps:
        return "masks are the same at every step; leave --steps out"
    if what == "sketch" and steps:
        return "what draws sketches is trained on one checkpoint; leave --steps out"
    return checkpoint.why_not(what) or (sketches.why_not(checkpoint, drawers) if what == "sketch" else "")


def check_numbers(options: argparse.Namespace) -> None:
    for name, least in (("count", 1), ("among", 2), ("seed", 0), ("size", 0), ("samples", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be {least} or more, got {getattr(options, name)}")
    if options.count > options.among:
        raise ValueError(f"--count {options.count} is more than --among {options.among}: those shown are among these")
    if options.size and options.what != "features":
        raise ValueError(f"--size is of features alone, got it with {options.what}; leave it out, or ask for features")
