"""A run's checkpoints: what they hold, whether they are whole, and which ones stay.

python launch/checkpoint.py inspect runs/vith14                                  all of a run
python launch/checkpoint.py inspect runs/vith14/checkpoints/step-00001000        one
python launch/checkpoint.py verify runs/vith14                                   reads every byte
python launch/checkpoint.py prune runs/vith14 --keep-last 1 --keep-every 10000   says what would go; --delete: deletes
python launch/checkpoint.py convert old/checkpoints/step-00001000 --out runs/new   to a run folder of this version

No GPU is needed. Exit codes: 0 done, 1 verify or inspect found something wrong, 2 wrong input.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ijepa_scale.verbs import fail, parser_of

if TYPE_CHECKING:
    from ijepa_scale.run.upkeep import Listed

NAMES = {"master": "weights", "exp_avg": "AdamW's first moments", "exp_avg_sq": "AdamW's second moments", "ema": "EMA"}


def parser() -> argparse.ArgumentParser:
    parser = parser_of("checkpoint", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect | verify | prune | convert")
    inspect = actions.add_parser("inspect", help="what there is: reads manifests and sizes")
    verify = actions.add_parser("verify", help="whether all of it is as it was written, there, and finite")
    prune = actions.add_parser("prune", help="delete older ones")
    convert = actions.add_parser("convert", help="of an earlier version to a run folder of this one")
    for action in (inspect, verify):
        action.add_argument("path", type=Path, metavar="RUN", help="a run folder, or a checkpoint of one")
    prune.add_argument("path", type=Path, metavar="RUN", help="a run folder")
    prune.add_argument("--keep-last", type=int, default=1, metavar="N", help="the newest that stay (default: 1)")
    prune.add_argument(
        "--keep-every", type=int, default=0, metavar="STEPS", help="so do those at its multiples (default: none)"
    )
    prune.add_argument("--delete", action="store_true", help="delete; without it nothing is touched")
    convert.add_argument("path", type=Path, metavar="CHECKPOINT", help="as RUN/checkpoints/step-00001000, or a run")
    convert.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new run folder")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.action == "inspect":
            return inspect(options.path)
        if options.action == "verify":
            return verify(options.path)
        if options.action == "prune":
            return prune(options.path, options.keep_last, options.keep_every, options.delete)
        return convert(options.path, options.out)
    except (ValueError, OSError) as error:
        return fail(error, 2)


def inspect(path: Path) -> int:
    from ijepa_scale.run import upkeep

    listed = [upkeep.look(one) for one in upkeep.find(path)]
    _print_table(listed)
    if (newest := upkeep.newest(listed)) is not None:
        _print_one(newest)
    return 1 if any(one.wrong for one in listed) else 0


def _print_table(listed: "list[Listed]") -> None:
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "size", "files", "written", "seen")
    for one in listed:
        written = datetime.fromtimestamp(one.path.stat().st_mtime).isoformat(" ", "minutes")
        files = str(len(one.found.manifest["files"])) if one.found else ""
        table.add_row(one.path.name, in_bytes(one.bytes), files, written, one.wrong or "sizes are right")
    Console(soft_wrap=True).print(table)


def _print_one(listed: "Listed") -> None:
    from ijepa_scale.engine import stored
    from ijepa_scale.run import upkeep

    found = listed.found
    assert found is not None
    manifest, objective = found.manifest, upkeep.described(found)
    images = found.step * manifest["config"]["optimization"]["global_batch_size"]
    architecture = ", ".join(f"{key} {value}" for key, value in objective.architecture().items())
    print(f"{found.path}\n  objective   {objective.name}: {architecture}")
    print(f"  step        {found.step:,}, after {images:,} images, of a source of {manifest.get('images', 0):,}")
    ranks, stage = manifest["world_size"], manifest["config"]["engine"]["zero_stage"]
    print(f"  written by  {ranks} rank{'s' * (ranks > 1)} at ZeRO-{stage}; any ranks and any stage can read it")
    for one in stored.held(found):
        pieces = f", in {one.pieces:,} pieces" if one.pieces > one.parameters else ""
        print(f"  {NAMES[one.kind]:22} {one.elements:>15,} fp32 values of {one.parameters:,} parameters{pieces}")


def verify(path: Path) -> int:
    from ijepa_scale.run import upkeep

    wrong = 0
    for one in upkeep.find(path):
        found = list(upkeep.complaints(one))
        print(f"{one}: {'whole: every file, every value' if not found else 'NOT WHOLE'}", flush=True)
        for complaint in found[:10]:
            print(f"  {complaint}")
        if len(found) > 10:
            print(f"  and {len(found) - 10:,} more")
        wrong += bool(found)
    if wrong:
        print("a run goes on from the newest whole one; delete or restore what is not", file=sys.stderr)
    return 1 if wrong else 0


def prune(path: Path, keep_last: int, keep_every: int, delete: bool) -> int:
    from ijepa_scale.run import upkeep

    gone = upkeep.prune(path, keep_last=keep_last, keep_every=keep_every, delete=delete)
    for one in gone:
        print(f"{'deleted' if delete else 'would delete'} {one.path} ({in_bytes(one.bytes)})")
    size = in_bytes(sum(one.bytes for one in gone))
    print(f"{len(gone)} checkpoints, {size}" + ("" if delete or not gone else "; nothing is touched without --delete"))
    return 0


def convert(path: Path, out: Path) -> int:
    from ijepa_scale.run import upkeep

    listed = [upkeep.look(one) for one in upkeep.find(path)]
    newest = upkeep.newest(listed)
    if newest is None:
        raise ValueError(f"{path} has no whole checkpoint: {listed[-1].wrong}")
    written = upkeep.convert(newest.path, out)
    print(f"{newest.path} -> {written.path}")
    print(f"next: python launch/pretrain.py --config {out}/config.yaml run_dir={out}")
    return 0


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
