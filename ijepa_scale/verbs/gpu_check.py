"""Measure a GPU and the ViT-H/14 step on it in eight minutes: what it sustains, where the time goes, what is wrong.

python launch/gpu_check.py                            all parts, to docs/measurements/DEVICE/ of a checkout
python launch/gpu_check.py --parts eager kernels      some of them
python launch/gpu_check.py --toy --out /tmp/check     all parts at the least size, on any machine

Exit codes: 0 all is well, 1 a part failed or found something wrong, 2 wrong input.
"""

import argparse
import sys
import time
from pathlib import Path

from ijepa_scale.verbs import fail, parser_of


def parser() -> argparse.ArgumentParser:
    parser = parser_of("gpu_check", __doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default docs/measurements/DEVICE)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these alone, in their order")
    parser.add_argument("--toy", action="store_true", help="a model of the least size; a CPU has no other")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    import torch

    from ijepa_scale.benchmark.check import CPU_SLACK, run_check
    from ijepa_scale.benchmark.parts import PARTS

    gpu = torch.cuda.is_available()
    try:
        unknown = set(options.parts or ()) - set(PARTS)
        if unknown:
            raise ValueError(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        out = options.out or folder(kept=gpu and not options.toy)
        names = [name for name in PARTS if name in (options.parts or PARTS)]
        failed = run_check(out, names, toy=options.toy or not gpu, say=say, slack=1.0 if gpu else CPU_SLACK)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    say(f"written: {out}")
    for name, why in failed.items():
        print(f"FAILED {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def folder(*, kept: bool) -> Path:
    """Where results are kept by default. ValueError where none are."""
    from ijepa_scale.benchmark.device import ask_driver
    from ijepa_scale.benchmark.timing import MEASUREMENTS, measurements

    if not kept or not MEASUREMENTS.is_dir():
        raise ValueError("what a CPU or a toy measures is not kept, nor is it outside of a checkout: give --out FOLDER")
    return measurements({"gpu": ask_driver("name")})  # torch would ask it by taking memory of it
