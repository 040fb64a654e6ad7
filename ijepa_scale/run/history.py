"""What a run wrote of itself, read again for curves and pages: also of one that goes on, or that died."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ijepa_scale.config.objective_sections import FIXED_TARGETS
from ijepa_scale.config.redaction import redacted
from ijepa_scale.run.records import read_records
from ijepa_scale.visualize.panels import Curve, Panel

AXES = ("steps", "images", "seconds")
# (key of a record, what it is, its unit, a factor to that unit, whether it is noisy), by what they tell.
STEP_CURVES = {
    "Learning": [("loss", "loss", "", 1.0, True)],  # its parts follow
    "Speed and memory": [
        ("images_per_second", "throughput", "images/s", 1.0, True),
        ("data_wait_percent", "waiting for images", "% of the step", 1.0, True),
        ("memory_bytes", "most memory so far, first process", "GiB", 2.0**-30, False),
        ("mfu", "MFU", "% of the device's peak", 100.0, True),
    ],
    "Schedules": [
        ("lr", "learning rate", "", 1.0, False),
        ("weight_decay", "weight decay", "", 1.0, False),
        ("ema_momentum", "EMA momentum", "", 1.0, False),
        ("grad_norm", "gradient norm, before clipping", "", 1.0, True),
    ],
}
HEALTH_CURVES = [
    ("knn", "k-NN accuracy, ± one standard error", "%", 1.0, False),
    ("rankme", "rank of the features (RankMe)", "", 1.0, False),
    ("feature_std", "feature std", "share of their size", 1.0, False),
    ("drift", "drift, target to context encoder", "1 - cosine", 1.0, False),
]
GROUPS = ("Learning", "Features", "Speed and memory", "Schedules")


@dataclass(frozen=True, kw_only=True)
class History:
    """A run folder's records. steps, health: one a step, in order. config, environment, report: {} where not there."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    report: dict[str, Any]
    steps: list[dict[str, Any]]
    health: list[dict[str, Any]]
    bad_images: int
    last_record: datetime.datetime

    @property
    def done(self) -> int:
        """Steps trained, those before the first record too."""
        return self.steps[-1]["step"] + 1 if self.steps else 0

    @property
    def planned(self) -> int:
        """Steps at which the run ends; 0 where that is not known."""
        options = self.config.get("optimization", {})
        total = options.get("max_steps", 0)
        epochs = self.column("epoch")[-1] if self.steps else 0.0
        if not total and epochs > 0:  # a record's epoch is its step / steps of an epoch
            total = round(options.get("epochs", 0) * self.steps[-1]["step"] / epochs)
        return min(options.get("stop_at_step") or total, total)

    @property
    def objective(self) -> str:
        """Its name; of old runs, which had no other, I-JEPA's."""
        configured = self.config.get("objective", {}).get("name", "ijepa")
        return str(self.environment.get("objective", configured))  # the config does not say which one a caller gave

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.report.get("step", -1) >= self.done

    @property
    def skipped(self) -> int:
        return sum(record.get("applied") is False for record in self.steps)

    @property
    def images_a_step(self) -> int:
        known = self.column("images_per_second") * self.column("step_seconds")
        return round(np.nanmedian(known)) if np.isfinite(known).any() else 0

    @property
    def begun(self) -> int:
        """The first step that is recorded: above 0 where the run goes on from another's checkpoint."""
        return self.steps[0]["step"] if self.steps else 0

    @property
    def images_seen(self) -> int:
        """By all steps; those before the first record had its batch."""
        return round(self._starts(self._images())[-1]) if self.steps else 0

    def _images(self) -> np.ndarray:
        """(len(steps),) images of each step, which a resume may have changed; the median where it is not known."""
        known = np.round(self.column("images_per_second") * self.column("step_seconds"))
        return np.where(np.isfinite(known), known, self.images_a_step)

    def _starts(self, each: np.ndarray) -> np.ndarray:
        """(len(steps) + 1,) of what each step took, what all before it took; and what all took."""
        at = column(self.steps, "step")
        before = at[0] * each[0] if len(at) else 0.0
        return before + np.concatenate(([0.0], np.cumsum(np.diff(at, append=at[-1:] + 1) * each)))

    def column(self, key: str) -> np.ndarray:
        """(len(steps),) float64, NaN where a step has no finite value."""
        return column(self.steps, key)

    def spent(self, axis: str, at: np.ndarray) -> np.ndarray:
        """What had been spent before each of the steps at, on one of AXES. Seconds are those of recorded steps."""
        if axis == "steps":
            return at
        seconds = self.column("step_seconds")
        if axis == "images":
            starts = self._starts(self._images())
        else:
            starts = np.concatenate(([0.0], np.cumsum(np.where(np.isfinite(seconds), seconds, 0.0))))
        return starts[np.searchsorted(column(self.steps, "step"), at)]


def read_history(path: str | Path) -> History:
    """Read a run folder. Raises ValueError, or OSError, which say what is wrong with it."""
    path = Path(path)
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{path} has no metrics.jsonl: give the folder of a run that has begun to train")
    records = read_records(metrics)
    if any(not isinstance(record, dict) for record in records):
        raise ValueError(f"{metrics} has a line that is no JSON object: no run has written it; remove that line")
    records = [record for record in records if isinstance(record.get("step"), int)]
    config = path / "config.yaml"
    return History(
        path=path,
        config=_read_config(config),
        environment=read_json(path / "environment.json"),
        report=read_json(path / "report.json"),
        steps=latest([record for record in records if record.get("kind", "step") == "step"]),
        health=latest([record for record in records if record.get("kind") == "health"]),
        bad_images=len({str(record.get("sample")) for record in records if record.get("kind") == "bad_image"}),
        last_record=datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """Without its secrets; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}; mend it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no config: it is no mapping")
    return redacted(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object without its secrets; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; remove it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; remove it")
    return redacted(value)


def latest(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in the order of their steps: one that is not later than others before it takes their place.

    So a run that went back to a checkpoint shows what it went on with.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def column(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    values = np.array([number(record.get(key)) for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def panels_of(histories: Sequence[History], axis: str) -> dict[str, list[Panel]]:
    """All curves that some run has, by group. axis: one of AXES."""
    along, scale = axis_words(histories, axis)
    parts = dict.fromkeys(key for one in histories for record in one.steps[:1] for key in record if key[:5] == "loss_")
    terms = [(key, f"loss, {key[5:].replace('_', ' ')} part", "", 1.0, True) for key in parts]
    moving = [history.objective not in FIXED_TARGETS for history in histories]
    groups = {}
    for group in GROUPS:
        wanted = STEP_CURVES.get(group, HEALTH_CURVES) + (terms if group == "Learning" else [])
        found = []
        for key, title, unit, factor, noisy in wanted:
            curves = []
            if key == "loss" and all(moving):
                title += ", may rise: its targets move"
            for run, history in enumerate(histories):
                if key == "ema_momentum" and not moving[run]:
                    continue  # there is no EMA
                records = history.health if group == "Features" else history.steps
                if key == "data_wait_percent":
                    values = 100.0 * history.column("data_wait_seconds") / history.column("step_seconds")
                else:
                    values = factor * column(records, key)
                if np.isfinite(values).any():
                    at = history.spent(axis, column(records, "step")) * scale
                    errors = knn_errors(records) if key == "knn" else None
                    curves.append(Curve(run=run, at=at, values=values, errors=errors))
            if curves:
                found.append(Panel(title=title, unit=unit, along=along, curves=curves, noisy=noisy))
        if found:
            groups[group] = found
    return groups


def knn_errors(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """Binomial standard errors in percent points; NaN where the number of test images is not recorded."""
    percent, count = column(records, "knn"), column(records, "knn_images")
    return np.sqrt(percent * (100.0 - percent) / count)


def axis_words(histories: Sequence[History], axis: str) -> tuple[str, float]:
    """What the axis is, and a factor to its unit."""
    if axis != "seconds":
        return axis, 1.0
    longest = max(float(np.nansum(history.column("step_seconds"))) for history in histories)
    for name, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * seconds:
            return f"{name} in training steps", 1.0 / seconds
    return "seconds in training steps", 1.0
