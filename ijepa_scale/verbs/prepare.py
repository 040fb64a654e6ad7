"""Resize a source once, to Parquet shards that training decodes faster: use them with data.source=OUT.

python launch/prepare.py /data/my_images /data/my_images_256 --shorter-side 256

All splits, with labels. Images that are small enough already, or too long for the format, keep their bytes.
Stopped, the same command goes on.
Exit codes: 0 done, 2 wrong input, 75 stopped on request: start it again.
"""

import signal
import sys
import time

from ijepa_scale.verbs import fail, parser_of


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("prepare", __doc__)
    parser.add_argument("source", help="as data.source, not scenes: a folder of images or data files, or a Hub id")
    parser.add_argument("out", help="the folder to write to: new, or of the same command before")
    parser.add_argument("--shorter-side", type=int, required=True, metavar="PIXELS", help="256 is fast: docs/data.md")
    parser.add_argument("--format", default="jpeg", help="jpeg (default) or webp: smaller, slower to decode")
    parser.add_argument("--quality", type=int, default=90, help="1 to 100 (default 90)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: as many as cores may be used)")
    bad = "of the images may be unreadable, and are left out (default 0.01)"
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="SHARE", help=bad)
    parser.add_argument("--max-pixels", type=int, default=None, help="of an image, as data.max_pixels; 0: any number")
    parser.add_argument("--cache-dir", default="", help="as data.cache_dir")
    parser.add_argument("--column", default="", help="as data.column: of the images, where several hold some")
    parser.add_argument("--config", default="", help="as data.config: of a data set that has several configurations")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from ijepa_scale.data.prepare import Options, prepare

    started = time.perf_counter()
    try:
        notes = prepare(
            options.source,
            options.out,
            Options(shorter_side=options.shorter_side, format=options.format, quality=options.quality),
            workers=options.workers,
            max_bad_fraction=options.max_bad_fraction,
            max_pixels=options.max_pixels,
            cache_dir=options.cache_dir,
            column=options.column,
            config=options.config,
        )
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, and the same command goes on", file=sys.stderr)
        return 75
    for name, reason in notes.bad[:20]:
        print(f"warning: left out: cannot read {name}: {reason}")
    if len(notes.bad) > 20:
        print(f"warning: and {len(notes.bad) - 20} more")
    before, after = notes.bytes_before / 1e6, notes.bytes_after / 1e6
    print(
        f"{notes.images:,} images ({notes.as_is:,} kept as they were, {len(notes.bad)} unreadable), "
        f"{before:,.1f} -> {after:,.1f} MB, {time.perf_counter() - started:.0f} s; use data.source={options.out}"
    )
    return 0
