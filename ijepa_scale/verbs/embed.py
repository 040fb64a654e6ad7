"""Embeddings of images by the target encoder of a trained run.

python launch/embed.py runs/small_images /data/my_images --out embeddings

Writes embeddings.npy (images x width, float32), images.csv (which image each row is) and embeddings.json to the folder.
Exit codes: 0 done, 2 wrong input.
"""

import sys

from ijepa_scale.verbs import parser_of


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("embed", __doc__)
    parser.add_argument("run", help="a run folder (its newest checkpoint is used) or a checkpoint folder")
    parser.add_argument("source", help="as data.source, not scenes: a folder of images or data files, or a Hub id")
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument("--split", default="train", help="of the source (default: train)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--cache-dir", default="", help="as data.cache_dir")
    parser.add_argument("--column", default="", help="as data.column: of the images, where several hold some")
    parser.add_argument("--config", default="", help="as data.config: of a data set that has several configurations")
    options = parser.parse_args(arguments)
    from ijepa_scale.evals.embed import embed

    try:
        embed(
            options.run,
            options.source,
            options.out,
            split=options.split,
            batch_size=options.batch_size,
            workers=options.workers,
            cache_dir=options.cache_dir,
            column=options.column,
            config=options.config,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
