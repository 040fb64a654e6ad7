"""Compare recipes of pre-training: which learns more from the same images, seconds and FLOPs.

python launch/compare.py --config configs/compare_small.yaml
python launch/compare.py --config configs/compare_small.yaml --dry-run               the runs, and how long they take
python launch/compare.py --config configs/compare_small.yaml seeds=[0] recipes.cae=null

Trains every recipe with every seed from the same encoder and in the same order of images, probes checkpoints, and
writes results.json, results.md and results.png to runs/<config name>. It starts the processes of a run itself: no
launcher. The same command goes on with what was stopped, and repeats nothing. docs/compare.md says more.
Exit codes: 0 done, 1 a run failed, 2 wrong input, 75 stopped by a signal: start it again.
"""

import argparse
from typing import TYPE_CHECKING, NoReturn

from ijepa_scale.verbs import fail, parser_of

if TYPE_CHECKING:
    from ijepa_scale.engine.signals import StopRequest


def parser() -> argparse.ArgumentParser:
    parser = parser_of("compare", __doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one of configs/, as compare_small")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config values over the file's, e.g. images=64000; all keys: ijepa_scale/config/comparison.py",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they take; train nothing")
    return parser


def main(arguments: list[str] | None = None) -> NoReturn:
    from ijepa_scale.engine.signals import run_process

    run_process(lambda stop: compare(stop, arguments))


def compare(stop: "StopRequest", arguments: list[str] | None) -> int:
    stop.doing = "set-up"
    options = parser().parse_intermixed_args(arguments)
    from ijepa_scale.compare import comparison
    from ijepa_scale.compare.pacing import plan_in_words
    from ijepa_scale.compare.runs import make_plan
    from ijepa_scale.config import load_comparison, without_secrets
    from ijepa_scale.data.collate import LoadError
    from ijepa_scale.run.incidents import RunError

    try:
        config = load_comparison(options.config, options.overrides)
        if options.dry_run:
            print(without_secrets(plan_in_words(make_plan(config))))
            return 0
        return comparison.compare(config, stop)
    except (RunError, LoadError) as error:
        return fail(error, 1)
    except (ValueError, OSError) as error:
        return fail(error, 2)
