"""Pre-train I-JEPA.

deepspeed launch/pretrain.py --config configs/vith14.yaml data.source=/data/imagenet     many GPUs, or CPU processes
python launch/pretrain.py --config configs/tiny.yaml optimization.max_steps=100          one process
torchrun --nproc-per-node 8 launch/pretrain.py --config configs/vitb16.yaml data.source=/data/images
ijepa-scale pretrain --config tiny                                                       installed: one process
deepspeed --module ijepa_scale.verbs.command pretrain --config vith14                    installed: many

Exit codes: 0 finished, 1 training failed, 2 wrong input, 75 stopped by a signal, with a checkpoint if it had begun to
train (run again to go on).
"""

import argparse
import logging
import os
from typing import TYPE_CHECKING, NoReturn

from ijepa_scale.verbs import fail, parser_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ijepa_scale.config import PretrainConfig
    from ijepa_scale.engine.signals import StopRequest

# Each step has its own numbers of tokens: without growing segments the GPU's memory falls to pieces.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def parser() -> argparse.ArgumentParser:
    parser = parser_of("pretrain", __doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one of configs/, such as vith14")
    add_training_arguments(parser)
    return parser


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="config values over the file's, e.g. optimization.lr=5e-4; all keys: ijepa_scale/config/sections.py",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): from the run folder's newest whole checkpoint, if any; never: refuse where there are "
        "checkpoints; PATH: start from that checkpoint, or from the newest whole one of that run folder",
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume although settings that alter training differ"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes, tokens, FLOPs and steps; train nothing")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher


def main(arguments: list[str] | None = None) -> NoReturn:
    """A process of a run, from its first moment to its exit code."""
    from ijepa_scale.engine.signals import run_process  # first of all: seconds before torch is imported

    run_process(lambda stop_request: train(stop_request, parser().parse_intermixed_args(arguments), config_of))


def config_of(options: argparse.Namespace) -> "PretrainConfig":
    from ijepa_scale.config import load_config

    return load_config(options.config, options.overrides)


def train(
    stop_request: "StopRequest", options: argparse.Namespace, load: "Callable[[argparse.Namespace], PretrainConfig]"
) -> int:
    """Train what load() makes of the options, or show it; the exit code."""
    from ijepa_scale.engine.launchers import launcher_rank

    log = logging.getLogger("ijepa_scale")  # not the root: to it come lines that other libraries print themselves
    log.addHandler(shown := logging.StreamHandler())
    shown.setFormatter(WithoutSecrets())
    log.setLevel(logging.INFO if launcher_rank() == 0 else logging.ERROR)
    try:
        config = load(options)
        check_sources(config, needed=not options.dry_run)
        if options.dry_run:
            from ijepa_scale.config import without_secrets
            from ijepa_scale.engine.launchers import place
            from ijepa_scale.plan.dry_run import dry_run
            from ijepa_scale.run.init_from import preview
            from ijepa_scale.run.setup import check_shared_memory

            text = dry_run(config, ranks=place().world_size)
            if launcher_rank() == 0:
                print(without_secrets("\n".join([text, *preview(config)])))
            check_shared_memory(config)  # last: what a run takes is shown on machines too small for it, too
            return 0
    except (ValueError, OSError) as error:
        return fail(error, 2) if options.dry_run else call_off(error)

    from ijepa_scale.train import InputError, RunError, pretrain

    try:
        return pretrain(config, resume=options.resume, allow_changes=options.allow_changes, stop_request=stop_request)
    except InputError as error:
        return call_off(error) if error.alone else fail(error, 2)
    except RunError as error:
        return fail(error, 1)


def check_sources(config: "PretrainConfig", *, needed: bool) -> None:
    """That there are none, or one is nowhere, is said at once, and not when torch has been imported."""
    from ijepa_scale.config import check_source_given
    from ijepa_scale.data.sources.inspection import check_there

    if needed:
        check_source_given(config)
    for path, _ in config.data.mixed_sources:
        check_there(path, streaming=config.data.streaming)


class WithoutSecrets(logging.Formatter):
    """Of a line that names a URL its password is not printed."""

    def format(self, record: logging.LogRecord) -> str:
        from ijepa_scale.config import without_secrets

        return without_secrets(super().format(record))


def call_off(error: Exception) -> int:
    """As fail(), where this process does not come to meet the others: they hear of it. The exit code."""
    from ijepa_scale.engine import roll_call

    fail(error, 2)
    roll_call.call_off(str(error))
    return 2
