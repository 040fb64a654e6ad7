"""The installed command: ijepa-scale VERB ..., as launch/VERB.py of a checkout.

On many GPUs: deepspeed --module ijepa_scale.verbs.command pretrain --config vith14 data.source=/data/imagenet
"""

import argparse
import importlib
import importlib.metadata
import sys

VERBS = {
    "pretrain": "train on images, on one process or on many",
    "plan": "what a recipe takes on a cluster: memory, hours, cost, and which setting to run",
    "prepare": "resize a source once, to shards that load faster",
    "compare": "which of several recipes learns more from the same images, seconds and FLOPs",
    "evaluate": "how good is an encoder: the paper's evaluations",
    "embed": "images -> features of a trained run",
    "report": "the page of a run, or several runs beside one another",
    "checkpoint": "inspect, verify, prune and convert the checkpoints of a run",
    "export": "a trained network -> a folder for transformers, timm, ONNX or safetensors",
    "neighbours": "nearest neighbours among embeddings, as a list and a picture",
    "visualize": "pictures of features, neighbours, predictions and masks of a trained run",
    "train_sketch": "a decoder or a flow that draws features of a trained run, for visualize sketch",
    "benchmark": "time the training step, or the input pipeline, on this machine",
    "gpu_check": "measure a GPU and the ViT-H/14 step on it in eight minutes",
}


def main(arguments: list[str] | None = None) -> int:
    listed = "\n".join(f"  {verb:14}{what}" for verb, what in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="ijepa-scale",
        usage="ijepa-scale VERB ...",
        description=f"Pre-train I-JEPA at scale. Verbs:\n{listed}\n\nijepa-scale VERB --help says what a verb takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(given)
    return importlib.import_module(f"ijepa_scale.verbs.{options.verb}").main(options.rest)


def version() -> str:
    try:
        return f"ijepa-scale {importlib.metadata.version('ijepa-scale')}"
    except importlib.metadata.PackageNotFoundError:
        return "ijepa-scale, from a checkout that is not installed"


if __name__ == "__main__":
    sys.exit(main())
