"""A plan in words: first what to run, then what else there is, then what was assumed. At most 100 columns."""

import io
import itertools
import math
import shlex
import textwrap
from collections.abc import Sequence

from ijepa_scale.plan.clusters import USABLE
from ijepa_scale.plan.sampling import is_fixed
from ijepa_scale.plan.settings import Planned, Setting, fastest_of
from ijepa_scale.plan.times import Assumed, sends_in_words

WIDTH, GIB = 100, 2**30
NAMES = ["", "ZeRO", "recompute", "micro"]  # of what a setting is named by


def command(planned: Planned, setting: Setting, *, config: str, overrides: Sequence[str]) -> str:
    """The command that trains so, in lines that a shell takes as one. config, overrides: as the user gave them."""
    cluster = planned.cluster
    if cluster.gpus == 1:
        start = "python"
    elif cluster.nodes == 1:
        start = f"deepspeed --num_gpus {cluster.gpus}"
    else:
        start = "deepspeed --hostfile hostfile"
    chosen = {
        "optimization.micro_batch_size": str(setting.micro_batch),
        "engine.zero_stage": str(setting.zero_stage),
        "engine.activation_checkpointing": setting.checkpointing,
    }
    kept = [text for text in overrides if text.partition("=")[0] not in chosen]
    source = [] if planned.config.data.source else ["data.source=SOURCE"]
    words = [f"{key}={value}" for key, value in chosen.items()] + [shlex.quote(text) for text in kept] + source
    lines = [f"{start} launch/pretrain.py --config {shlex.quote(config)}"]
    for word in words:
        if len(lines) > 1 and len(lines[-1]) + len(word) < WIDTH - 6:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return " \\\n".join(lines)


def in_words(
    planned: Planned, assumed: Assumed, *, config: str, overrides: Sequence[str], price: float, every: bool
) -> str:
    """The whole answer. every: all micro-batches, else of each stage and checkpointing the fastest that fits."""
    shown = planned.settings if every else _best_of_each(planned.settings)
    fastest = planned.fastest
    parts = [headline(planned, config)]
    if fastest is None:
        least = min(planned.settings, key=lambda one: one.memory.total)
        parts.append(
            f"Nothing fits: the least is {least.memory.total / GIB:,.1f} GiB a GPU (ZeRO-{least.zero_stage}, "
            f"{least.checkpointing}, micro-batch {least.micro_batch}), of {least.usable / GIB:,.1f}.\n"
            "Use more GPUs, or larger ones."
        )
    else:
        indented = command(planned, fastest, config=config, overrides=overrides).replace("\n", "\n  ")
        cost = f", {price * planned.cluster.gpus * planned.hours(fastest):,.0f} at {price:,g} a GPU-hour" * bool(price)
        parts.append(
            f"Run this, the fastest that fits:\n\n  {indented}\n\n"
            f"{planned.images_per_second(fastest):,.0f} images/s, {planned.hours(fastest):,.1f} hours, "
            f"{planned.cluster.gpus * planned.hours(fastest):,.0f} GPU-hours{cost}; "
            f"{fastest.memory.total / GIB:,.1f} of {fastest.usable / GIB:,.1f} GiB a GPU.{_hostfile(planned)}"
        )
    parts += [
        "Time: by arithmetic, not measured. > is the one above. Micro: images at once x micro-steps.\n"
        "GFLOP: of an image. Scatter and gather: what a GPU sends in a step; wait: what is not hidden.\n\n"
        + rendered(*time_rows(planned, shown, price)),
        "Memory of a GPU, GiB. ! does not fit. Recompute: engine.activation_checkpointing.\n\n"
        + rendered(*memory_rows(planned, shown)),
        listed("Assumed", assumptions(planned, assumed)),
    ]
    return "\n\n".join(parts)


def headline(planned: Planned, config: str) -> str:
    cluster = planned.cluster
    nodes = f" ({cluster.nodes} nodes of {cluster.node})" if cluster.nodes > 1 else ""
    return (
        f"{config} on {cluster.gpus} x {cluster.gpu}{nodes}: {planned.steps:,} steps of {planned.images:,} images, "
        f"{planned.images // cluster.gpus:,} a GPU"
    )


def _hostfile(planned: Planned) -> str:
    cluster = planned.cluster
    if cluster.nodes == 1:
        return ""
    return f"\nhostfile: a line `NODE slots={cluster.node}` for each node. Other launchers: docs/many_nodes.md."


def _best_of_each(settings: Sequence[Setting]) -> list[Setting]:
    """Of each stage and checkpointing the fastest that fits, or what takes the least memory."""
    groups = itertools.groupby(settings, key=lambda one: (one.zero_stage, one.checkpointing))
    found = [list(group) for _, group in groups]
    return [fastest_of(group) or min(group, key=lambda one: one.memory.total) for group in found]


def _named(planned: Planned, one: Setting) -> list[str]:
    mark = ">" if one is planned.fastest else "" if one.fits else "!"
    return [mark, str(one.zero_stage), one.checkpointing, f"{one.micro_batch} x {one.micro_steps}"]


def time_rows(planned: Planned, settings: Sequence[Setting], price: float) -> tuple[list[str], list[list[str]]]:
    heads = [*NAMES, "GFLOP", "scatter GB", "gather GB", "wait ms", "step ms"]
    heads += ["img/s", "hours", "GPU-h", *(["cost"] if price else [])]
    rows = []
    for one in settings:
        scattered, gathered = sends_in_words(one.sent, planned.cluster.gpus)
        spent = planned.cluster.gpus * planned.hours(one)
        rows.append(
            [
                *_named(planned, one),
                f"{(one.flops.model + one.flops.again) / 1e9:,.0f}",
                *(f"{sent / 1e9:,.2f}" for sent in (scattered, gathered)),
                *(f"{1e3 * seconds:,.0f}" for seconds in (one.step.exposed, one.step.seconds)),
                f"{planned.images_per_second(one):,.0f}",
                f"{planned.hours(one):,.1f}",
                f"{spent:,.0f}",
                *([f"{price * spent:,.0f}"] if price else []),
            ]
        )
    return heads, rows


def memory_rows(planned: Planned, settings: Sequence[Setting]) -> tuple[list[str], list[list[str]]]:
    heads = [*NAMES, "weights", "gradients", "optimizer", "EMA", "activations", "buffers"]
    offloads = any(one.memory.host for one in settings)
    rows = []
    for one in settings:
        held = one.memory
        parts = [held.weights, held.gradients, held.optimizer, held.ema, held.activations, held.buffers, held.total]
        parts += [held.host] * offloads
        rows.append([*_named(planned, one), *(f"{part / GIB:,.1f}" for part in parts)])
    return [*heads, f"of {settings[0].usable / GIB:,.1f}", *(["host"] if offloads else [])], rows


def rendered(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, head in enumerate(heads):
        table.add_column(Text(head.replace(" ", "\n")), justify="left" if place in (0, 2) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def listed(title: str, lines: Sequence[str]) -> str:
    wrapped = (textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in lines)
    return "\n".join([f"{title}:", *wrapped])


def assumptions(planned: Planned, assumed: Assumed) -> list[str]:
    """What the figures rest on, and what could be said better by whom knows it."""
    cluster, kind = planned.cluster, planned.cluster.kind
    rates = kind.sustained
    if assumed.mfu is not None:
        lines = [
            f"compute at {100 * assumed.mfu:g}% of the peak, {kind.peak / 1e12:,.0f} TFLOP/s (--mfu); what is computed "
            "again at the same rate"
        ]
    else:
        slower = f"; all times x {kind.slower:.3f}, as that step took" if kind.slower != 1 else ""
        lines = [
            f"{cluster.gpu}: {rates.matrix / 1e12:,.0f} of {kind.peak / 1e12:,.0f} TFLOP/s sustained in large "
            f"products, {rates.copy / 1e12:,.2f} TB/s moved: {kind.source}",
            f"the step is that of plan/step_model.py{slower}; a share of the peak instead: --mfu",
            "a small micro-batch runs at the rates of a large one, which is likely too fast",
        ]
    if cluster.gpus > 1:
        joined = f"; a node reaches others at {cluster.network / 1e9:,.1f} GB/s (--interconnect)" * (cluster.nodes > 1)
        lines += [
            f"within a node {kind.link / 1e9:,.0f} GB/s a GPU each way, by the data sheet{joined}",
            f"collectives reach {100 * assumed.link_efficiency:g}% of that (--link-efficiency), over rings, "
            f"{1e6 * assumed.hop_seconds:g} us a hop (--hop-us)",
            f"they hide behind {100 * assumed.overlap:g}% of the forward's and the backward's time (--overlap), and "
            "slow neither",
        ]
    lines += [
        f"memory: {planned.settings[0].usable / 1e9:,.1f} GB of a GPU (--memory; else {100 * USABLE:g}% of the data "
        "sheet's); activations are those of the step with the most tokens of those sampled, and all parts are taken to "
        "be at their most at once",
        "not known and not counted: ranks that wait for one another (their tokens differ), loading images, "
        "checkpoints, health checks, failures",
    ]
    return lines + _of_this_config(planned)


def _of_this_config(planned: Planned) -> list[str]:
    from ijepa_scale import build

    config, lines = planned.config, []
    if is_fixed(build.build_objective(config)):
        lines.append("the micro-batch is the config's, as here it alters what is learned")
    if config.objective.name == "ijepa" and (config.loss.variance or config.loss.covariance):
        lines.append("what the terms loss.variance and loss.covariance take, of time and of links, is not counted")
    if not math.isclose(config.optimization.clip_grad_norm, 0.0):
        lines.append("clipping costs nothing: the norm is taken anyway")
    if config.engine.offload_optimizer == "cpu":
        lines.append(
            "host: memory of the node for each of its GPUs; the time is that of a GPU's own optimizer: what the host's "
            "takes, and its copies, is not known and comes on top"
        )
    if config.optimization.optimizer == "muon":
        lines.append("Muon's products run at the rate of large ones; at ZeRO-3 every rank computes all of them")
    return lines
