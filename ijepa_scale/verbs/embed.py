"""Embeddings of images by the target encoder of a trained run, or of a checkpoint of the public reference.

python launch/embed.py runs/small_images /data/my_images --out embeddings

Writes embeddings.npy (images x width, float32), images.csv (which image each row is) and embeddings.json to the folder.
Exit codes: 0 done, 2 wrong input.
"""

import sys
from pathlib import Path
from typing import Any

from ijepa_scale.verbs import parser_of


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("embed", __doc__)
    parser.add_argument(
        "run", help="a run folder (its newest checkpoint is used), a checkpoint, or a file of the reference"
    )
    parser.add_argument("source", help="as data.source, not scenes: a folder of images or data files, or a Hub id")
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument("--split", default="train", help="of the source (default: train)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--cache-dir", default="", help="as data.cache_dir")
    parser.add_argument("--column", default="", help="as data.column: of the images, where several hold some")
    parser.add_argument("--config", default="", help="as data.config: of a data set that has several configurations")
    options = parser.parse_args(arguments)
    try:
        embed_source(**vars(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def embed_source(
    run: str,
    source: str,
    out: str,
    *,
    split: str = "train",
    batch_size: int = 64,
    workers: int = 2,
    cache_dir: str = "",
    column: str = "",
    config: str = "",
) -> None:
    """Load the encoder, open the images, and write the features of these by that."""
    from rich.progress import track

    from ijepa_scale.data.images import open_images
    from ijepa_scale.engine.distributed import alone
    from ijepa_scale.evals.embed import EMBEDDINGS, FACTS, IMAGES, embed
    from ijepa_scale.exchange.load import load

    loaded = load(run)
    for note in loaded.notes:
        print(note, flush=True)
    reading: dict[str, Any] = {"cache_dir": cache_dir, "column": column, "config": config}
    images = open_images(source, split=split, **reading)
    encoder: Any = loaded.network.to(alone().device)
    print(f"{images.name}: {len(images):,} images -> {encoder.size.width} numbers each, by {loaded.path}", flush=True)
    facts = {
        "run": str(Path(run).absolute()),
        "checkpoint": str(loaded.path.absolute()),
        "checkpoint_sha256": loaded.sha256,
        "step": loaded.step,
        "source": str(Path(source).absolute()) if Path(source).exists() else source,
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
        watch=lambda batches: track(batches, description="embedding", disable=len(images) < batch_size),
    )
    for name, reason in list(unreadable.items())[:10]:
        print(f"warning: left out: cannot read {name}: {reason}")
    print(f"{count:,} embeddings, {len(unreadable)} unreadable images: {out}/{EMBEDDINGS}, {IMAGES}, {FACTS}")
