"""Embeddings of images by the encoder of a trained run, or of a checkpoint of another project.

python launch/embed.py runs/small_images /data/my_images --out embeddings

Writes embeddings.npy (images x width, float32), images.csv (which image each row is) and embeddings.json to the folder,
with --patches also embeddings.patches.npy (images x patches x width). Stopped, the same command goes on.
Exit codes: 0 done, 2 wrong input, 75 stopped with Ctrl-C (run again to go on).
"""

import sys
from pathlib import Path
from typing import Any

from ijepa_scale.verbs import fail, parser_of

STOPPED = 75  # as of a run that is stopped


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("embed", __doc__)
    parser.add_argument(
        "run", help="a run folder (its newest checkpoint is used), a checkpoint, or a file of another project"
    )
    parser.add_argument("source", help="as data.source, not scenes: a folder of images or data files, or a Hub id")
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument("--split", default="train", help="of the source (default: train)")
    parser.add_argument(
        "--network",
        default="target",
        metavar="target|context",
        help="which encoder (default: target; where there is one alone, that one)",
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N", help="blocks from 0, or from the end with -1, "
        "side by side, each after the final norm (default: the encoder's output)",
    )  # fmt: skip
    parser.add_argument("--patches", action="store_true", help="also the features of each patch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--cache-dir", default="", help="as data.cache_dir")
    parser.add_argument("--column", default="", help="as data.column: of the images, where several hold some")
    parser.add_argument("--config", default="", help="as data.config: of a data set that has several configurations")
    options = parser.parse_args(arguments)
    from ijepa_scale.data.collate import LoadError

    try:
        embed_source(**vars(options))
    except LoadError as error:
        return fail(error, 1)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what is in {options.out}", file=sys.stderr)
        return STOPPED
    return 0


def embed_source(
    run: str,
    source: str,
    out: str,
    *,
    split: str = "train",
    network: str = "target",
    layers: list[int] | None = None,
    patches: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    cache_dir: str = "",
    column: str = "",
    config: str = "",
) -> None:
    """Load the encoder, open the images, and write the features of these by that."""
    from ijepa_scale.data.images import open_images
    from ijepa_scale.engine.distributed import alone
    from ijepa_scale.evals.embed import EMBEDDINGS, FACTS, IMAGES, PATCHES, check_layers, embed, patch_bytes
    from ijepa_scale.exchange.load import load, source_of
    from ijepa_scale.exchange.networks import ENCODERS
    from ijepa_scale.run.progress import watched

    check_numbers(batch_size, workers)
    if network not in ENCODERS:
        raise ValueError(f"--network must be target or context, got {network!r}")
    loaded = load(run, network)
    for note in loaded.notes:
        print(note, flush=True)
    encoder: Any = loaded.network.to(alone().device)
    check_layers(encoder, layers or ())
    reading: dict[str, Any] = {"cache_dir": cache_dir, "column": column, "config": config}
    images = open_images(source, split=split, **reading)
    width = encoder.size.width * max(1, len(layers or ()))
    print(f"{images.name}: {len(images):,} images -> {width} numbers each, by {loaded.path}", flush=True)
    if patches:
        size = patch_bytes(encoder, len(images), loaded.image_size, layers or ())
        print(f"and {width} numbers of each patch: {size / 1e9:,.2f} GB in {PATCHES}", flush=True)
    facts = {
        "run": absolute(run),
        "checkpoint": source_of(run, loaded),
        "checkpoint_sha256": loaded.sha256,
        "network": loaded.name,
        "step": loaded.step,
        "source": absolute(source),
        "split": images.split,
        **reading,
    }
    count, unreadable = embed(
        encoder,
        images,
        Path(out),
        facts,
        image_size=loaded.image_size,
        batch_size=batch_size,
        workers=workers,
        layers=layers or (),
        patches=patches,
        say=lambda text: print(text, flush=True),
        watch=lambda batches: watched("embedding", batches) if len(images) >= batch_size else batches,
    )
    for name, reason in list(unreadable.items())[:10]:
        print(f"warning: left out: cannot read {name}: {reason}")
    made = ", ".join([EMBEDDINGS, *[PATCHES] * patches, IMAGES, FACTS])
    print(f"{count:,} embeddings, {len(unreadable)} unreadable images: {out}/{made}")


def check_numbers(batch_size: int, workers: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {batch_size}")
    if workers < 0:
        raise ValueError(f"--workers must be 0 (this process loads) or more, got {workers}")


def absolute(path: str) -> str:
    """A path that holds wherever it is read; what is no path here, such as a Hub id, as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path
