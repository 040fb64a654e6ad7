"""A run's checkpoints while nobody trains: what they are, whether they are whole, which ones stay, how old ones are."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ijepa_scale import build
from ijepa_scale.config import from_dict, to_dict, to_yaml, without_secrets
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import stored
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import alone
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.run.folder import RunFolder


@dataclass(frozen=True)
class Listed:
    """A checkpoint folder by its manifest and the sizes of its files. wrong: what is, in words, or ""."""

    path: Path
    found: Checkpoint | None
    bytes: int
    wrong: str


def find(path: Path) -> list[Path]:
    """The checkpoint that a path is, or those of a run folder, oldest first. ValueError where there is none."""
    if (path / checkpoints.MANIFEST).is_file():
        return [path]
    for folder in (path / "checkpoints", path):
        if candidates := checkpoints.candidates(folder):
            return candidates[::-1]
    raise ValueError(f"{path} has no checkpoint; give a run folder, or a checkpoint as RUN/checkpoints/step-00001000")


def look(path: Path) -> Listed:
    """Reads the manifest and asks for sizes: quick, also where files are large."""
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    try:
        manifest = checkpoints.read_manifest(path)
        for entry in manifest["files"]:
            if complaint := checkpoints.not_whole(path, entry):
                raise ValueError(complaint)
    except (ValueError, KeyError, TypeError) as error:
        return Listed(path, None, size, str(error) or type(error).__name__)
    return Listed(path, Checkpoint(path, manifest), size, "")


def described(found: Checkpoint) -> Objective:
    """The objective of a checkpoint's config. ValueError for a config that this version cannot read."""
    try:
        return build.build_objective(from_dict(found.manifest["config"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{found.path} says nothing usable of its config: {error}") from error


def expected(objective: Objective) -> dict[str, dict[str, int]]:
    """What a checkpoint of an objective must hold: kind -> parameter -> elements."""
    with torch.device("meta"):
        module = objective.build()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = {
        names[id(parameter)]: parameter.numel()
        for network in objective.trained(module).values()
        for parameter in network.parameters()
    }
    averaged = {names[id(parameter)]: parameter.numel() for parameter, _ in objective.averaged(module)}
    return {kind: averaged if kind == "ema" else trained for kind in checkpoints.KINDS}


def complaints(path: Path) -> Iterator[str]:
    """All that is wrong with a checkpoint: reads every byte of it."""
    found, complaint = checkpoints.verify(path, alone())
    if found is None:
        yield complaint
        return
    try:
        yield from stored.faults(found, expected(described(found)))
    except ValueError as error:
        yield str(error)


def prune(path: Path, *, keep_last: int, keep_every: int, delete: bool) -> list[Listed]:
    """Of a run all but the newest keep_last whole checkpoints and those at multiples of keep_every; damaged ones stay.

    Returns what goes. delete: now; else nothing is touched. Raises ValueError where the run is in use, and where no
    whole checkpoint would stay.
    """
    folder = RunFolder(path)
    if not folder.checkpoints.is_dir():
        raise ValueError(f"{path} is no run: there is no folder {folder.checkpoints}")
    if keep_last < 1 or keep_every < 0:
        raise ValueError(f"--keep-last must be 1 or more and --keep-every 0 or more, got {keep_last} and {keep_every}")
    folder.lock()  # held until this process ends: no run begins meanwhile
    listed = [look(one) for one in find(path)]
    whole = [one for one in listed if one.found]
    if not whole:
        raise ValueError(f"{path} has no whole checkpoint; nothing is deleted")
    doomed = [one for one in whole[:-keep_last] if not (keep_every and _step(one) % keep_every == 0)]
    for one in doomed if delete else ():
        hidden = one.path.with_name(f".partial-{one.path.name}")  # a kill half-way leaves no broken candidate
        os.rename(one.path, hidden)
        shutil.rmtree(hidden)
    return doomed


def _step(listed: Listed) -> int:
    assert listed.found is not None
    return listed.found.step


def convert(path: Path, out: Path) -> Checkpoint:
    """A checkpoint of an earlier version as a run folder `out` of today's, whole or not at all.

    Its files are copied, its manifest says all that today's say, with the names and the defaults of today. Raises
    ValueError for one that is not whole or not known, and where `out` is taken.
    """
    if (out / "config.yaml").exists() or checkpoints.candidates(out / "checkpoints"):
        raise ValueError(f"{out} is a run already; give a new folder")
    if wrong := list(complaints(path)):
        raise ValueError(f"{path} cannot be converted: {wrong[0]}")
    found = Checkpoint(path, checkpoints.read_manifest(path))
    config, objective = from_dict(found.manifest["config"]), described(found)
    today = {
        "objective": objective.name,
        "config": without_secrets(to_dict(config)),
        "architecture": objective.architecture(),
    }
    folder = RunFolder(out)
    folder.lock()
    written = stored.copy(found, folder.checkpoints, found.manifest | today)
    folder.describe(to_yaml(config), converted_from=str(path.resolve()))
    return written


def newest(listed: Sequence[Listed]) -> Listed | None:
    return next((one for one in reversed(listed) if one.found), None)
