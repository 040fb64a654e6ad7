"""Files and words -> PretrainConfig and back; what may differ between a checkpoint and a run that resumes it."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ijepa_scale.config import reading as config_reading
from ijepa_scale.config.redaction import HIDDEN, without_secrets
from ijepa_scale.config.sections import PretrainConfig

# Full names of keys and of sections in files and checkpoints of earlier versions -> their names today.
RENAMED: dict[str, str] = {}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in a checkout a link to its configs/


def load_config(path: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Read a YAML file, then key.sub=value overrides, over the defaults.

    path: a file, or the name of one of the package's own, as vith14, vith14.yaml or configs/vith14.yaml. Overrides of
    text keys are taken as they are typed, all others are read as YAML. Raises ValueError, in one line that names the
    key, for a missing file, an unknown key (with the nearest valid one), a key given twice, a wrong type, or values
    that do not fit together.
    """
    path = find_config(path)
    config = config_reading.read(PretrainConfig, path, overrides or [], RENAMED)
    return config if config.run_dir else replace(config, run_dir=f"runs/{path.stem}")


def find_config(path: str | Path) -> Path:
    """The file at a path, or one of the package's own by its name. Raises ValueError, which lists them, else."""
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return path
    own = CONFIGS / f"{path.name.removesuffix('.yaml')}.yaml"
    if str(path.parent) in (".", "configs") and own.is_file():
        return own
    names = ", ".join(sorted(other.stem for other in CONFIGS.glob("*.yaml")))
    raise ValueError(f"no config file {path}; give a YAML file, or one of these names: {names}")


def from_dict(values: dict[str, Any]) -> PretrainConfig:
    """The config that a checkpoint holds, also one of an earlier version: a key that it lacks means its default.

    The inverse of to_dict(). Raises ValueError as load_config does, and for a checkpoint of a later version.
    """
    return config_reading.from_literal(PretrainConfig, _of_today(values))


def _of_today(values: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config with the names of today."""
    values = config_reading.renamed(values, RENAMED)
    if isinstance(values.get("data"), dict) and isinstance(values["data"].get("source"), int):
        values["data"]["source"] = str(values["data"]["source"])  # earlier versions kept a folder's number as one
    if unknown := config_reading.unknown_keys(PretrainConfig, values):
        raise ValueError(
            f"the checkpoint's config has keys that this version of ijepa-scale does not know: {', '.join(unknown)}; "
            "it is of a later version: install that one"
        )
    return values


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars, as JSON holds them."""
    return json.loads(json.dumps(asdict(config)))


def by_key(config: PretrainConfig) -> dict[str, Any]:
    """Values by the full names of their keys, as JSON holds them."""
    return config_reading.flat(to_dict(config))


def to_yaml(config: PretrainConfig) -> str:
    """What load_config() reads as this config, less its secrets."""
    return config_reading.to_yaml(without_secrets(to_dict(config)))


def valid_keys() -> list[str]:
    """All full names of config keys, sections left out."""
    return [name for name, _ in config_reading.leaves(PretrainConfig)]


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that alter training and differ between a checkpoint's config and to_dict() of today's: {key: (old, new)}.

    Raises ValueError for a checkpoint of a later version.
    """
    usual = config_reading.flat(to_dict(PretrainConfig()))  # of a key that an older version did not have yet
    # A password may be another one, and is not kept: earlier versions kept it.
    before, after = (config_reading.flat(without_secrets(one)) for one in (_of_today(old), new))
    before = usual | before
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not config_reading.is_free(PretrainConfig, key)
    }


def check_source_given(config: PretrainConfig) -> None:
    """ValueError where there is nothing to train on."""
    if not config.data.source:
        raise ValueError(
            "data.source is not set: give a folder of images, of tars or of Parquet files, or a hub id, for example "
            "data.source=/data/my_images; or data.source=scenes for rendered scenes"
        )
    for path, _ in config.data.mixed_sources:
        if HIDDEN in path:
            raise ValueError(f"data.source {path} is as a run keeps it, without its password or query: give all of it")
