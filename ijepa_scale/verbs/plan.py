"""What a recipe takes on a cluster: memory, bytes sent, hours and cost of each setting, and which of them to run.

python launch/plan.py --config configs/vitg16.yaml --gpus 64 --gpu a100-80g                     the fastest that fits
python launch/plan.py --config configs/vitg16.yaml --gpus 64 --gpu a100-80g --recommend         its command alone
python launch/plan.py --config configs/vitg16.yaml --gpu h100 --sweep 8,64,512,4096 --out scaling.png

No GPU is needed, and nothing is opened or trained: all is counted from the config. docs/plan.md says how.
Exit codes: 0 done, 2 wrong input, or nothing fits.
"""

import argparse

from ijepa_scale.verbs import fail, parser_of


def parser() -> argparse.ArgumentParser:
    parser = parser_of("plan", __doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one of configs/, such as vith14")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="config values over the file's, as pretrain takes them"
    )
    parser.add_argument("--gpu", required=True, help="which, as a100-80g or h100; another word lists all")
    parser.add_argument("--gpus", type=int, help="how many in all")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="that a fast link joins (default: 8)")
    parser.add_argument(
        "--interconnect", default="", metavar="NAME|GB/s", help="of a node to others (default: the vendor's own node's)"
    )
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU for an hour, in your currency")
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="of the peak while it computes (default: modelled)")
    parser.add_argument("--link-efficiency", type=float, default=0.8, metavar="SHARE", help="(default: 0.8)")
    parser.add_argument(
        "--overlap", type=float, default=0.8, metavar="SHARE", help="of computing that hides sending (default: 0.8)"
    )
    parser.add_argument("--hop-us", type=float, default=2.0, metavar="US", help="of a ring of GPUs (default: 2)")
    parser.add_argument("--memory", type=float, default=0.0, metavar="GB", help="of a GPU that training may take")
    parser.add_argument("--recommend", action="store_true", help="print the command of the fastest that fits, alone")
    parser.add_argument("--all", action="store_true", help="every micro-batch, not the best of each row alone")
    parser.add_argument("--sweep", default="", metavar="N,N,...", help="weak and strong scaling over so many GPUs")
    parser.add_argument("--out", default="scaling.png", help="where --sweep draws (default: scaling.png)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    from ijepa_scale.config import without_secrets

    try:
        print(without_secrets(answer(options)))
    except (ValueError, OSError) as error:
        return fail(error, 2)
    return 0


def answer(options: argparse.Namespace) -> str:
    from ijepa_scale.config import load_config
    from ijepa_scale.plan import table
    from ijepa_scale.plan.clusters import cluster_of
    from ijepa_scale.plan.settings import plan
    from ijepa_scale.plan.sweep import numbers_of, sweep
    from ijepa_scale.plan.times import Assumed

    if bool(options.sweep) == (options.gpus is not None):
        raise ValueError("give --gpus N, or --sweep N,N,... for several numbers of them")
    if options.price < 0 or options.memory < 0:
        raise ValueError(f"--price and --memory must not be negative, got {options.price} and {options.memory}")
    config = load_config(options.config, options.overrides)
    assumed = Assumed(
        mfu=options.mfu,
        link_efficiency=options.link_efficiency,
        overlap=options.overlap,
        hop_seconds=1e-6 * options.hop_us,
    )
    of_nodes = {"node": options.gpus_per_node, "network": options.interconnect}
    if options.sweep:
        numbers = numbers_of(options.sweep)
        clusters = [cluster_of(options.gpu, number, **of_nodes) for number in numbers]
        return sweep(config, clusters, assumed, usable=1e9 * options.memory, path=options.out, name=options.config)
    cluster = cluster_of(options.gpu, options.gpus, **of_nodes)
    planned = plan(config, cluster, assumed, usable=1e9 * options.memory)
    given = {"config": options.config, "overrides": options.overrides}
    if not options.recommend:
        return table.in_words(planned, assumed, **given, price=options.price, every=options.all)
    if planned.fastest is None:
        raise ValueError("nothing fits; use more GPUs, or larger ones (without --recommend: what each setting takes)")
    return table.command(planned, planned.fastest, **given)
