"""Time the training step on this machine's GPU or CPU against a dense baseline, or the input pipeline; no launcher.

python launch/benchmark.py --config configs/tiny.yaml
python launch/benchmark.py --config configs/vits16.yaml optimization.micro_batch_size=32 --steps 5 --json vits16.json
python launch/benchmark.py --config configs/vith14.yaml --keep --profile traces/vith14
python launch/benchmark.py --data /data/my_images --size 224    # from stored images to crops, images/s per core

Exit codes: 0 done, 2 wrong input.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ijepa_scale.verbs import fail, parser_of

# As launch/pretrain.py does: memory and time are to be training's.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmark", __doc__)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--config", help="time a config's training step against a dense baseline: a file or a name")
    subject.add_argument(
        "--data", metavar="SOURCE", help="time reading and cropping a source's images (as data.source, not scenes)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config values over the file's")
    parser.add_argument("--steps", type=int, default=10, help="rounds timed, after warm-up (default 10)")
    parser.add_argument("--size", type=int, default=224, help="of --data: pixels a side of a crop (default 224)")
    parser.add_argument("--split", default="train", help="of --data (default train)")
    parser.add_argument("--column", default="", help="of --data: as data.column")
    parser.add_argument("--data-config", default="", metavar="NAME", help="of --data: as data.config")
    cores = min(8, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="of --data: loader processes (default: cores, up to 8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument(
        "--keep", action="store_true", help="of --config: write them to a checkout's docs/measurements/DEVICE/"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="of --config: trace a few steps there, and show what takes time"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own log is between our lines
    from ijepa_scale.benchmark import tables, timing

    try:
        if options.steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {options.steps}")
        written = tables.writable(options.json, keep=options.keep)
        found = time_data(options) if options.data is not None else time_steps(options)
        if options.keep:
            written.append(timing.measurements(found["machine"]) / f"step-{found['config']}.json")
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        return fail(error, 2)
    (tables.show_steps if options.data is None else tables.show_data)(found)
    if "profile" in found:
        tables.show_profile(found["profile"])
    for path in written:
        print(f"written: {os.path.relpath(path)}")
    if "no_profile" in found:
        print(f"error: no profile: {found['no_profile']}", file=sys.stderr)
        return 2
    return 0


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    from ijepa_scale.benchmark.step import benchmark
    from ijepa_scale.config import load_config

    config = load_config(options.config, options.overrides)
    found = benchmark(config, steps=options.steps, say=_say, profile=options.profile)
    return {"config": Path(options.config).stem, "overrides": options.overrides, **found}


def time_data(options: argparse.Namespace) -> dict[str, Any]:
    from ijepa_scale.benchmark.data import benchmark_data

    if options.keep or options.profile:
        raise ValueError("--keep and --profile go with --config")
    if options.overrides:
        raise ValueError(f"--data takes no config values, got {options.overrides[0]!r}; use --size, --split, --workers")
    for name, least in (("size", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be {least} or more, got {getattr(options, name)}")
    return benchmark_data(
        options.data,
        size=options.size,
        rounds=options.steps,
        workers=options.workers,
        split=options.split,
        say=_say,
        column=options.column,
        config=options.data_config,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
