"""Parquet in a local folder, such as a clone of a data set of the Hub: its splits, and the rows that its card tells."""

import glob
import os
from pathlib import Path
from typing import Any

from ijepa_scale.data.sources.contents import count_rows
from ijepa_scale.data.sources.folders import printable, shard_splits, warn_once

_CARD = "README.md"


def clone_builder(root: str, files: list[str], cache_dir: str | None, name: str = "") -> Any:
    """The `datasets` builder of Parquet files, relative to root, in the splits that the card or their names tell.

    What is not downloaded yet is told and not waited for: splits without files, and rows that the card tells of. name:
    of one of the card's configurations, "": the usual one.
    """
    import datasets

    config, info = _card(root, name)
    inside = {os.path.realpath(os.path.join(root, file)): file for file in files}

    def from_files(splits: dict[str, list[str]]) -> Any:
        data_files = {split: [os.path.join(root, file) for file in part] for split, part in splits.items()}
        return datasets.load_dataset_builder("parquet", data_files=data_files, cache_dir=cache_dir)

    told = _files_of_splits(root, (config or {}).get("data_files"), set(files))
    if any(told.values()) and not all(told.values()):
        builder = from_files({split: part for split, part in told.items() if part})
        absent = [split for split, part in told.items() if not part]
        warn_once(f"{printable(root)}: files of {', '.join(absent)}, which {_CARD} tells of, are not there")
    else:
        try:
            builder = datasets.load_dataset_builder(root, name or None, cache_dir=cache_dir)
        except Exception as error:
            if name or config is None:  # one is to be chosen
                raise
            warn_once(f"{printable(root)}: the splits are told by names alone, as `datasets` cannot open it: {error}")
            builder = from_files(shard_splits(files))
        read = {os.path.realpath(str(file)) for part in (builder.config.data_files or {}).values() for file in part}
        if not read or not read <= inside.keys():  # it went by the number of files, or by their names
            builder = from_files(shard_splits(files))
        elif unread := sorted(inside[path] for path in inside.keys() - read):
            warn_once(
                f"{printable(root)}: left out: {len(unread)} of the Parquet files, in no split by their names or "
                f"{_CARD}, such as {printable(unread[0])}; to read them, give them as the source"
            )
    _compare_rows(root, builder, info)
    return builder


def _card(root: str, name: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A configuration by the head of the card, {} without any, None where one is to be chosen; and its dataset_info."""
    import huggingface_hub

    path = Path(root) / _CARD
    head = (huggingface_hub.metadata_load(path) if path.is_file() else None) or {}
    configs, infos = _listed(head.get("configs")), _listed(head.get("dataset_info"))
    if name:
        chosen = [one for one in configs if one.get("config_name") == name]
    elif len(configs) == 1:
        chosen = configs
    else:
        chosen = [one for one in configs if one.get("default") or one.get("config_name") == "default"]
    if configs and not chosen:
        return None, {}
    config = chosen[0] if chosen else {}
    name = name or config.get("config_name", "default")
    infos = [one for one in infos if one.get("config_name", name) == name]
    return config, (infos or [{}])[0]


def _listed(value: Any) -> list[dict[str, Any]]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]


def _files_of_splits(root: str, told: Any, files: set[str]) -> dict[str, list[str]]:
    """Which of the files the patterns of a card mean, by split; {} where it tells none."""
    if isinstance(told, dict):
        told = [{"split": split, "path": path} for split, path in told.items()]
    splits: dict[str, list[str]] = {}
    for one in _listed(told):
        paths = one.get("path", [])
        for pattern in paths if isinstance(paths, list) else [paths]:
            found = glob.glob(os.path.normpath(str(pattern)), root_dir=root, recursive=True)
            splits.setdefault(str(one.get("split")), []).extend(sorted(files.intersection(found)))
    return splits


def _compare_rows(root: str, builder: Any, info: dict[str, Any]) -> None:
    """Say which splits have not the rows that the card tells."""
    differing = []
    for split in _listed(info.get("splits")):
        name, wanted = str(split.get("name")), split.get("num_examples")
        files = [str(file) for file in (builder.config.data_files or {}).get(name, [])]
        if isinstance(wanted, int) and (held := count_rows(files)) != wanted:
            differing.append(f"{held:,} rows of {wanted:,} of {name}")
    if differing:
        warn_once(
            f"{printable(root)} is not as its card, {_CARD}, tells: it holds {', '.join(differing)}; what is there is "
            "read; if the rest is wanted, download it again"
        )
