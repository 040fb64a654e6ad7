"""Train what draws sketches of a frozen encoder's features, for launch/visualize.py sketch.

python launch/train_sketch.py --checkpoint runs/tiny                     a decoder: features of all patches -> pixels
python launch/train_sketch.py --checkpoint runs/tiny --config sketch_flow_small     many sketches of what is in a box
deepspeed launch/train_sketch.py --checkpoint runs/vith14 --config sketch_large     many GPUs

The same engine, order, checkpoints and resume as pre-training: the same command goes on. The run is in RUN/sketch (of a
flow RUN/sketch-flow), and at its end pictures are drawn. docs/visualize.md says more. Exit codes: as of pretrain.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ijepa_scale.verbs import parser_of
from ijepa_scale.verbs.pretrain import add_training_arguments, train

if TYPE_CHECKING:
    from ijepa_scale.config import PretrainConfig
    from ijepa_scale.engine.signals import StopRequest


def parser() -> argparse.ArgumentParser:
    parser = parser_of("train_sketch", __doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run of I-JEPA, or a checkpoint of one")
    parser.add_argument(
        "--config", default="sketch_small", help="a YAML file, or a name of configs/ (default: sketch_small)"
    )
    add_training_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> NoReturn:
    """A process of a run, from its first moment to its exit code."""
    from ijepa_scale.engine.signals import run_process

    run_process(lambda stop_request: train_and_draw(stop_request, parser().parse_intermixed_args(arguments)))


def train_and_draw(stop_request: "StopRequest", options: argparse.Namespace) -> int:
    configs: list[PretrainConfig] = []

    def load(options: argparse.Namespace) -> "PretrainConfig":
        configs.append(sketch_config(options))
        return configs[-1]

    code = train(stop_request, options, load)
    from ijepa_scale.engine.launchers import launcher_rank

    if code == 0 and launcher_rank() == 0 and not options.dry_run:
        code = draw(configs[-1])
    return code


def draw(config: "PretrainConfig") -> int:
    """The pictures of what was trained, in the folder of the encoder's run where there is one, and its page anew."""
    from ijepa_scale.run.page import write_page
    from ijepa_scale.verbs import visualize

    run, source = run_of(config), config.data.source
    out = f"{run or config.run_dir}/pictures"
    words = ["sketch", "--checkpoint", config.sketch.checkpoint, "--out", out, "--cache-dir", config.data.cache_dir]
    words += [f"--{config.sketch.kind}", config.run_dir]
    if isinstance(source, str) and source != "scenes":  # else those of the encoder's run
        words += ["--images", source]
    if code := visualize.main(words):
        return code
    if run:
        print(f"page: {write_page(run)}")
    return 0


def run_of(config: "PretrainConfig") -> "Path | None":
    """The run of the encoder."""
    checkpoint = Path(config.sketch.checkpoint)
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None


def sketch_config(options: argparse.Namespace) -> "PretrainConfig":
    """The config with what the encoder fixes. Raises ValueError as load_config() and of_encoder() do, and for a setting
    of the command that says otherwise.
    """
    from ijepa_scale.config import by_key, load_config
    from ijepa_scale.pictures.sketches import FOLDERS
    from ijepa_scale.run.frozen import of_encoder

    config = load_config(options.config, options.overrides)
    if config.objective.name != "sketch":
        raise ValueError(f"--config {options.config} is of objective.name={config.objective.name}; give one of sketch")
    usual = config.run_dir == f"runs/{Path(options.config).stem}"
    given = by_key(config)
    config = of_encoder(replace(config, sketch=replace(config.sketch, checkpoint=options.checkpoint)))
    fixed = by_key(config)
    for key in (word.partition("=")[0] for word in options.overrides):
        if given.get(key) != fixed.get(key):
            raise ValueError(
                f"{key}={given[key]} cannot be: --checkpoint {options.checkpoint} fixes it, as {fixed[key]}"
            )
    if usual and (run := run_of(config)):
        config = replace(config, run_dir=str(run / FOLDERS[config.sketch.kind]))
    return config
