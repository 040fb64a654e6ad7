"""How good is an encoder? The paper's evaluations, and others, of anything that holds one.

python launch/evaluate.py knn --checkpoint runs/small_images --data /data/my_images
python launch/evaluate.py linear --checkpoint runs/small_images --data /data/my_images --features lr=0.02
deepspeed launch/evaluate.py all --checkpoint runs/vith14 --data /data/imagenet        many GPUs, or CPU processes

TASK is one of these, or all, for those that the source's columns allow:
{tasks}

Prints a table, and writes results.json and pictures to --out. Settings of a task are given as key=value (with all:
TASK.key=value); docs/evaluation.md lists them. Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal.
"""

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn

from ijepa_scale.verbs import fail, parser_of

if TYPE_CHECKING:
    from ijepa_scale.engine.signals import StopRequest

TASKS = {
    "knn": "k nearest neighbours: nothing is trained",
    "linear": "linear heads on frozen features, as the paper's linear probe",
    "logistic": "logistic regression of frozen features: quick",
    "lowshot": "the same with 1% and 10% of the labels, or some a class",
    "attentive": "a cross-attention head on frozen patch features",
    "finetune": "the whole network, trained on",
    "count": "Clevr's: how many objects a picture has",
    "distance": "Clevr's: how far away the nearest object is",
}


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12}{what}" for name, what in TASKS.items())
    parser = parser_of("evaluate", (__doc__ or "").format(tasks=listed))
    parser.add_argument("task", metavar="TASK", choices=[*TASKS, "all"], help="see above")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the task, over its defaults")
    parser.add_argument(
        "--checkpoint", required=True, metavar="WHAT", help="a run, a checkpoint, or others of docs/export.md"
    )
    parser.add_argument("--network", default="target", choices=["target", "context"], help="which of its encoders")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="labelled images, as data.source; or scenes")
    parser.add_argument("--test-data", default="", metavar="SOURCE", help="where the test images are elsewhere")
    parser.add_argument("--split", default="train", help="to fit on (default: train)")
    parser.add_argument("--test-split", default="", help="to judge by (default: validation or test; or a fifth of all)")
    some = "at most so many, evenly over the classes, to {} (default: all)"
    parser.add_argument("--train-images", type=int, default=0, metavar="N", help=some.format("fit on"))
    parser.add_argument("--test-images", type=int, default=0, metavar="N", help=some.format("judge by"))
    parser.add_argument("--label", default="", metavar="COLUMN", help="of classes, where several may be meant")
    parser.add_argument("--features", action="store_true", help="features=true, for tasks that have it: much quicker")
    parser.add_argument("--out", default="", help="folder of results (default: evaluations/ of the run, or here)")
    parser.add_argument("--image-size", type=int, default=0, help="pixels a side (default: as it was trained)")
    parser.add_argument("--batch-size", type=int, default=64, help="images that a rank encodes at a time")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of a rank")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--cache-dir", default="", help="as data.cache_dir; features are kept there, too")
    parser.add_argument("--column", default="", help="as data.column: of the images, where several hold some")
    parser.add_argument("--config", default="", help="as data.config: of a data set that has several configurations")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def main(arguments: list[str] | None = None) -> NoReturn:
    from ijepa_scale.engine.signals import run_process

    run_process(lambda stop: evaluate(stop, arguments))


def evaluate(stop: "StopRequest", arguments: list[str] | None) -> int:
    stop.doing = "the evaluation"
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_intermixed_args(given)
    from ijepa_scale.data.collate import LoadError
    from ijepa_scale.engine.distributed import start
    from ijepa_scale.evaluate import Request, check_request, evaluate_tasks

    try:
        asked = {key: value for key, value in vars(options).items() if key != "local_rank"}
        typed = [word for word in given if not word.startswith("--local_rank")]  # the launcher's, not the user's
        request = Request(**asked, arguments=typed)
        check_request(request)
        ranks = start()
        evaluate_tasks(ranks, request)
    except LoadError as error:
        return fail(error, 1)
    except (ValueError, OSError) as error:  # no rank is waited for: it may be in a collective
        return fail(error, 2)
    ranks.close()
    return 0
