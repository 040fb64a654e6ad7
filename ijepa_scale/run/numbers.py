"""What a run's page says in numbers: each with its unit, and with its standard error where there is one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ijepa_scale.config.reading import flat
from ijepa_scale.run.history import History, column, knn_errors
from ijepa_scale.run.records import is_number
from ijepa_scale.run.verdict import health_verdict

METHODS = {
    "ijepa": "I-JEPA",
    "mae": "MAE",
    "data2vec": "data2vec",
    "cae": "CAE",
    "sketch": "Sketches of an encoder's features",
}
LAST = 0.05  # the share of the steps that a last value is the mean of
FLOP_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (0.0, "GFLOP"))
HEAD = ("run", "steps", "images seen", "time in steps", "loss", "k-NN, %", "rank", "verdict", "images/s", "memory, GiB")


def method(history: History) -> str:
    return METHODS.get(history.objective, history.objective)


def source(history: History) -> str:
    return str(history.environment.get("source") or history.config.get("data", {}).get("source") or "unknown images")


def encoder(history: History) -> str:
    model = history.config.get("model", {})
    if not model:
        return ""
    set_here = [
        f"{key.replace('_', ' ')} {model[key]}" for key in ("width", "depth", "heads", "mlp_width") if model.get(key)
    ]
    return ", ".join([f"{model.get('name')}", f"patches of {model.get('patch_size')} pixels a side", *set_here])


def images(history: History) -> str:
    count, side = history.environment.get("images"), history.config.get("data", {}).get("image_size")
    words = f"{count:,} of {source(history)}" if isinstance(count, int) and count else source(history)
    return f"{words}, {side} pixels a side" if side else words


def steps(history: History) -> str:
    return f"{history.done:,} of {history.planned:,}" if history.planned else f"{history.done:,}"


def state(history: History) -> str:
    if history.finished:
        return f"finished after {steps(history)} steps"
    return f"{steps(history)} steps so far, not finished (it goes on, or was stopped)"


def batch(history: History) -> str:
    size = history.config.get("optimization", {}).get("global_batch_size") or history.images_a_step
    ranks = history.environment.get("world_size")
    words = f"{size:,} images a step" if size else ""
    return f"{words}, {ranks} {'process' if ranks == 1 else 'processes'}" if words and ranks else words


def loss(history: History) -> str:
    """The mean of the last steps, and its standard error."""
    values = history.column("loss")
    known = values[np.isfinite(values)]
    last = known[-max(10, round(LAST * len(known))) :]
    if not len(last):
        return ""
    if len(last) < 3:
        return f"{last[-1]:.4f} at the last step"
    error = last.std(ddof=1) / math.sqrt(len(last))
    return f"{last.mean():.4f} ± {error:.4f}, mean of the last {len(last)} steps"


def throughput(history: History) -> tuple[str, str]:
    """The median, and a note on the spread."""
    values = history.column("images_per_second")
    known = values[np.isfinite(values)]
    if not len(known):
        return "unknown", ""
    low, middle, high = np.quantile(known, (0.1, 0.5, 0.9))
    return f"{middle:,.1f} images/s", f"median; 8 of 10 steps from {low:,.1f} to {high:,.1f}"


def seconds(history: History) -> float:
    return float(np.nansum(history.column("step_seconds")))


def duration(seconds: float) -> str:
    for unit, small, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole:,.0f} {unit} {rest // (size / (24 if unit == 'd' else 60)):.0f} {small}"
    return f"{seconds:.1f} s"


def recorded(history: History) -> str:
    """Of how many steps times and FLOPs are, where those of the first ones are in another run's records; else ""."""
    return f" of the last {history.done - history.begun:,} steps" if history.begun else ""


def flops(history: History) -> str:
    total = float(np.nansum(history.column("model_flops")))
    unit, name = next((unit, name) for unit, name in FLOP_UNITS if total >= unit)
    return f"{total / (unit or 1e9):,.3g} {name} of the model{recorded(history)}" if total else ""


def memory(history: History, unit: str = " GiB in the first process") -> str:
    values = history.column("memory_bytes")
    return f"{np.nanmax(values) / 2**30:.1f}{unit}" if np.isfinite(values).any() else ""


def knn(record: dict[str, Any]) -> str:
    """Percent, and the standard error where the number of test images is recorded."""
    value, error = column([record], "knn")[0], knn_errors([record])[0]
    if not is_number(value):
        return ""
    return f"{value:.1f} ± {error:.1f}" if is_number(error) else f"{value:.1f}"


def plain(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else ""


def row(history: History) -> list[str]:
    """A run in the table of a comparison; HEAD names the columns."""
    last = history.health[-1] if history.health else {}
    seen = history.images_seen
    return [
        steps(history),
        f"{seen:,}" if seen else "",
        duration(seconds(history)) + recorded(history),
        loss(history).partition(",")[0],
        knn(last),
        plain(last.get("rankme")),
        health_verdict(history.health, objective=history.objective).partition(":")[0],
        throughput(history)[0].removesuffix(" images/s"),
        memory(history, ""),
    ]


def differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Keys of the configs whose values are not the same in all, and these values.

    A key that an older run does not have is left out: it has its default there.
    """
    configs = [flat(history.config) for history in histories]
    keys = [key for key in configs[0] if key != "run_dir" and all(key in one for one in configs)]
    rows = [(key, [str(one[key]) for one in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
