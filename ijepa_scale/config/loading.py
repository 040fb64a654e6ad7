"""Files and words -> PretrainConfig and back; what may differ between a checkpoint and a run that resumes it."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ijepa_scale.config import reading as config_reading
from ijepa_scale.config.sections import PretrainConfig

# What may differ between a checkpoint and the run that resumes it: it does not change what is trained.
FREE_KEYS = (
    "run_dir",
    "data.workers",
    "data.retry_seconds",
    "data.cache_dir",
    "data.eval_split",
    "data.max_bad_fraction",
    "data.max_pixels",  # to be raised where it stops a run; which images are left out is told
    "model.attention",  # beyond rounding
    "optimization.micro_batch_size",
    "optimization.stop_at_step",
    "engine.zero_stage",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.hang_seconds",
    "checkpoint.",
    "logging.",
    "report.",
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Read a YAML file, then key.sub=value overrides, over the defaults.

    Overrides of text keys are taken as they are typed, all others are read as YAML. Raises ValueError, in one line that
    names the key, for a missing file, an unknown key (with the nearest valid one), a key given twice, a wrong type, or
    values that do not fit together.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        near = ", ".join(sorted(str(other) for other in Path("configs").glob("*.yaml")))
        raise ValueError(f"no config file {path}" + (f"; there are {near}" if near else ""))
    config = config_reading.read(PretrainConfig, path, overrides or [])
    return config if config.run_dir else replace(config, run_dir=f"runs/{path.stem}")


def from_dict(values: dict[str, Any]) -> PretrainConfig:
    """The inverse of to_dict(); raises ValueError as load_config does."""
    if isinstance(values.get("data"), dict) and isinstance(values["data"].get("source"), int):
        values = values | {"data": values["data"] | {"source": str(values["data"]["source"])}}  # of earlier versions
    return config_reading.from_literal(PretrainConfig, values)


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars, as JSON holds them."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: PretrainConfig) -> str:
    """What load_config() reads as this config."""
    return config_reading.to_yaml(to_dict(config))


def valid_keys() -> list[str]:
    """All full names of config keys, sections left out."""
    return [name for name, _ in config_reading.leaves(PretrainConfig)]


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that alter training and differ between two to_dict() results: {key: (old, new)}."""
    usual = config_reading.flat(to_dict(PretrainConfig()))  # of a key that an older version did not have yet
    before, after = usual | config_reading.flat(old), config_reading.flat(new)
    if isinstance(before.get("data.source"), int):
        before["data.source"] = str(before["data.source"])  # earlier versions kept a folder's number as one
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)
    }
