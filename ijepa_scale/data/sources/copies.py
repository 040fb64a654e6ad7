"""Copies of Parquet and Hub data in the cache, from where `datasets` maps them into memory."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale.data.files import cache_path
from ijepa_scale.data.sources.remote import hub_access_advice

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)

TOLD_BYTES = 1e9  # of a copy, from which on its size is told beside its progress


def copied_split(builder: Any, split: str, source: str, cache_dir: str | None) -> datasets.Dataset:
    """One split of a source, mapped from the cache, where it is first copied unless it is there.

    Local files are copied one after the other: stopped, the same call goes on with those that are left.
    """
    import datasets

    parts, local = parts_of(builder, split), bool(_local_files(builder))
    needed, sizes = check_copy(parts, split, source, cache_dir)
    if needed >= TOLD_BYTES:
        _log.info("%s; copying", sizes)
    with explained(f"cannot read {source!r}", hub_id="" if local else source), _progress(parts) as done:
        for part in parts:
            # clone_builder() has compared the rows, and what is not downloaded yet need not stop a run
            part.download_and_prepare(verification_mode="no_checks" if local else "basic_checks")
            done()
        return datasets.concatenate_datasets([part.as_dataset(split=split) for part in parts])


def parts_of(builder: Any, split: str) -> list[Any]:
    """A builder for each local file of a split; the builder itself where all of it is cached, or on the Hub."""
    import datasets
    import pyarrow.parquet as pq

    files = _local_files(builder, split)
    if not files or len(_local_files(builder)) == 1 or os.path.isdir(builder.cache_dir):
        return [builder]
    features = builder.info.features
    if features is None:  # as `datasets` would take them, and the same for all files
        features = datasets.Features.from_arrow_schema(pq.read_schema(_local_files(builder)[0]))
    cache = os.path.normpath(builder._cache_dir_root)
    return [
        datasets.load_dataset_builder("parquet", data_files={split: [file]}, features=features, cache_dir=cache)
        for file in files
    ]


@contextlib.contextmanager
def _progress(parts: list[Any]) -> Iterator[Callable[[], None]]:
    """A bar over files to copy, on stderr, instead of one of `datasets` for each; gives what is called after a file."""
    import datasets
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    missing = not all(os.path.isdir(part.cache_dir) for part in parts)
    if len(parts) == 1 or not missing:  # `datasets` shows its own, of rows
        yield lambda: None
        return
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
            bar = progress.add_task("copying files to the cache", total=len(parts))
            yield lambda: progress.advance(bar)
    finally:
        if shown:
            datasets.enable_progress_bars()


def check_copy(parts: list[Any], split: str, source: str, cache_dir: str | None) -> tuple[int, str]:
    """What the copy of a split to the cache takes, in bytes and in words; 0 where it is there already.

    parts: of parts_of().
    ValueError where there is no room for it, and where a file cannot be copied.
    """
    import pyarrow.parquet

    needed, free, folder = copy_need(parts, split, cache_dir)
    sizes = f"{source!r} needs about {needed / 1e9:.3f} GB in the cache {folder}, which has {free / 1e9:.3f} GB free"
    if needed > free:
        raise ValueError(f"{sizes}; make room there, or set data.cache_dir to a folder on a larger disk")
    with explained(f"cannot read {source!r}"):
        for file in (file for part in parts if needed for file in _local_files(part, split)):
            if pyarrow.parquet.read_metadata(file).num_rows == 0:  # `datasets` fails on it, and does not say why
                raise ValueError(f"{file} has no rows; remove it")
    return needed, sizes


def copy_need(parts: list[Any], split: str, cache_dir: str | None) -> tuple[int, int, str]:
    """(bytes yet to be copied, estimated from the sizes of files; bytes free in the cache; the cache folder)."""
    folder = cache_folder(cache_dir)
    free = shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free
    missing = [part for part in parts if not os.path.isdir(part.cache_dir)]
    local = sum(os.path.getsize(file) for part in missing for file in _local_files(part, split))
    told = sum((part.info.download_size or 0) + (part.info.dataset_size or 0) for part in missing)
    return local or told, free, str(folder)


def _local_files(builder: Any, split: str = "") -> list[str]:
    """The files of a split, or of all splits, that lie on this machine."""
    splits = builder.config.data_files or {}
    files = [str(file) for name, files in splits.items() if str(name) == split or not split for file in files]
    return [file for file in files if os.path.isfile(file)]


def cache_folder(cache_dir: str | None) -> Path:
    import datasets

    return cache_path(cache_dir or str(datasets.config.HF_DATASETS_CACHE))


@contextlib.contextmanager
def explained(what: str, *, hub_id: str = "") -> Iterator[None]:
    """Turns any error into a ValueError that says what failed, and why: `datasets` hides that at the end of a chain.

    hub_id: of a data set on the Hub, for what to do where that refuses it.
    """
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        advice = _hub_advice(hub_id, chain) if hub_id else ""
        reason = " ".join(str(chain[-1]).split())  # YAML's and pyarrow's are of several lines
        raise ValueError(
            f"{what}: {type(chain[-1]).__name__}: {reason.rstrip('.') if advice else reason}{advice}"
        ) from error


def _hub_advice(hub_id: str, chain: list[BaseException]) -> str:
    import datasets
    import huggingface_hub.errors

    refused = (
        datasets.exceptions.DatasetNotFoundError,
        huggingface_hub.errors.RepositoryNotFoundError,  # and GatedRepoError
        PermissionError,
    )
    status = [getattr(getattr(error, "response", None), "status_code", None) for error in chain]
    if any(isinstance(error, refused) for error in chain) or {401, 403} & set(status):
        return "; check the id; " + hub_access_advice(hub_id)
    if any(isinstance(error, ConnectionError) for error in chain):
        return "; check this machine's network, or copy the data set here and give its folder as the source"
    return ""
