"""Checkpoints that are complete or do not exist, and that any ZeRO stage and any number of ranks can read.

A checkpoint is a folder step-00001000 with one safetensors file a rank, holding the runs of each parameter that it owns
(keys "kind|name|first element"), and manifest.json with every file's size and SHA-256, and its own.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ijepa_scale.data.files import remove_leftovers, sync, write_whole
from ijepa_scale.engine import roll_call
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.engine.zero import fragments, masters, refresh_weights

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
MANIFEST = "manifest.json"
LATEST = "latest"  # a hint for people and tools; resuming looks at the folders themselves
FORMAT = 1
REPLACED = ".partial-replaced-"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; unfinished ones have another name."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True) if folder.is_dir() else []


def _state(engine: Any, ema: ShardedEMA) -> dict[str, list[torch.Tensor | None]]:
    """The flats of each kind. Moments that AdamW has not made yet are made here, zero."""
    optimizer = engine.optimizer
    flats = masters(optimizer)
    state: dict[str, list[torch.Tensor | None]] = {"master": [*flats], "ema": [*ema.shards]}
    moments = optimizer.optimizer.state
    for flat in flats:
        if not moments[flat]:
            moments[flat].update(
                step=torch.zeros((), device=flat.device),
                exp_avg=torch.zeros_like(flat),
                exp_avg_sq=torch.zeros_like(flat),
            )
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = [moments[flat][kind] for flat in flats]
    return state


def _own_pieces(engine: Any, ema: ShardedEMA) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """(kind, parameter, first element, this rank's values: a view) of everything this rank owns."""
    state = _state(engine, ema)
    for fragment in fragments(engine.optimizer):
        for kind in KINDS:
            flat = state[kind][fragment.flat]
            if flat is not None:
                yield kind, fragment.name, fragment.start, flat.detach().narrow(0, fragment.offset, fragment.numel)


def save(folder: Path, engine: Any, ema: ShardedEMA, ranks: Ranks, *, step: int, meta: dict[str, Any]) -> Path:
    """Write folder/step-XXXXXXXX; on return it is on disk, verified by its writers, on every rank's word.

    Order: files under a temporary name, fsync, read back; manifest; fsync; rename; pointer. Raises OSError on
    every rank when any could not write; what was there before is then untouched, the temporary folder gone.
    """
    return Saving(folder, engine, ema, ranks, step=step, meta=meta).finish()


class Saving:
    """A checkpoint of the state as it is now. It is there, and resumed from, only after finish() on all ranks.

    aside: this rank's state is copied, and a thread writes it while training goes on; else finish() writes it. Raises
    OSError on every rank where there is no room.
    """

    def __init__(
        self,
        folder: Path,
        engine: Any,
        ema: ShardedEMA,
        ranks: Ranks,
        *,
        step: int,
        meta: dict[str, Any],
        aside: bool = False,
    ) -> None:
        pieces = {
            f"{kind}|{name}|{start}": values.to("cpu", copy=aside).contiguous()
            for kind, name, start, values in _own_pieces(engine, ema)
        }
        file_bytes = sum(values.numel() * values.element_size() for values in pieces.values())
        total_bytes = int(ranks.sum([float(file_bytes)])[0])
        self.step, self._ranks = step, ranks
        self._manifest = {
            "format": FORMAT,
            "step": step,
            "optimizer_step": int(engine.optimizer.optimizer.state[masters(engine.optimizer)[0]]["step"].item()),
            "world_size": ranks.world_size,
            **meta,
        }
        self._final, self._partial = folder / folder_name(step), folder / f".partial-{folder_name(step)}"
        with self._cleaned_up():
            ranks.together(lambda: make_room(self._partial, total_bytes) if ranks.first else None)
        self._written: Future[dict[str, Any]] = Future()
        self._pieces = pieces
        if aside:
            # A daemon: where training ends with an error it is left half-way, as by a kill.
            threading.Thread(target=self._write, name="checkpoint", daemon=True).start()
        self._aside = aside

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._aside and not self._written.done()

    def finish(self) -> Path:
        """Wait for all files, and make them the checkpoint. All ranks call it. Raises as save() does."""
        if not self._aside:
            self._write()
        with self._cleaned_up():
            files = self._ranks.gather(self._ranks.together(self._written.result))
            manifest = {**self._manifest, "files": files}
            self._ranks.together(lambda: publish(self._partial, self._final, manifest) if self._ranks.first else None)
        return self._final

    def _write(self) -> None:
        try:
            self._written.set_result(_write_file(self._partial, self._ranks.rank, self._pieces))
        except BaseException as error:  # for finish() to raise
            self._written.set_exception(error)
        self._pieces = {}

    @contextlib.contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self._ranks.first:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise


def make_room(partial: Path, total_bytes: int) -> None:
    """An empty folder for a checkpoint's files. OSError where they will not fit."""
    folder = partial.parent
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):  # of a killed run; the run folder's lock keeps others out
        shutil.rmtree(leftover, ignore_errors=True)
    remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if free < total_bytes * 1.05:
        raise OSError(f"a checkpoint takes {total_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free")
    partial.mkdir()


def _write_file(partial: Path, rank: int, pieces: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A rank's file, on disk and read back; its entry in the manifest."""
    path = partial / f"rank-{rank:05d}.safetensors"
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors' own files are their owner's alone
    try:
        save_file(pieces, path)
        path.chmod(mode)
        sync(path)
        with safe_open(path, framework="pt") as file:
            for key, values in pieces.items():
                if not _same_bits(file.get_tensor(key), values):
                    raise OSError(f"{path} reads back differently than it was written: {key}")
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, give the folder its name, and point to it."""
    folder = final.parent
    manifest = {**manifest, "sha256": _digest(manifest)}
    write_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
    sync(partial)
    replaced = folder / f"{REPLACED}{final.name}"
    if final.exists():  # left by a run that went on from an older checkpoint
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    write_whole(folder / LATEST, final.name + "\n")
    sync(folder)


def prune(folder: Path, ranks: Ranks, *, keep_last: int, keep_every: int, newest: int) -> str:
    """Delete all but the newest keep_last checkpoints and those at multiples of keep_every (0: none of these).

    newest: the step just saved. Later ones, which a resume left behind as damaged, are not counted and stay.
    Returns, on the first rank, why one could not be deleted, or "": what stays is tried again at the next save.
    """
    failed = ""
    steps = [int(path.name.removeprefix("step-")) for path in candidates(folder)] if ranks.first else []
    for step in [step for step in steps if step <= newest][keep_last:]:
        if not keep_every or step % keep_every:
            doomed = folder / f".partial-{folder_name(step)}"  # so that a kill half-way leaves no broken candidate
            try:
                os.rename(folder / folder_name(step), doomed)
            except OSError as error:
                failed = str(error)
            shutil.rmtree(doomed, ignore_errors=True)
    ranks.barrier()
    return failed


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError, saying why, for a missing, unreadable or foreign manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is not of format {FORMAT}")
    if not isinstance(manifest.get("step"), int) or not isinstance(manifest.get("files"), list):
        raise ValueError(f"{MANIFEST} lacks its step or its files")
    for entry in manifest["files"]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"{MANIFEST} lists {entry!r}, which is no file of its folder")
    if manifest.get("sha256") != _digest(manifest):
        raise ValueError(f"{MANIFEST} does not match its SHA-256: it was changed or damaged")
    return manifest


def not_whole(path: Path, entry: dict[str, Any]) -> str:
    """What is wrong with a file of a checkpoint, by its manifest's entry, without reading it; "": nothing."""
    file = path / entry["name"]
    size = file.stat().st_size if file.is_file() else None
    if size is None:
        return f"{entry['name']} is missing"
    return f"{entry['name']} has {size:,} bytes instead of {entry['bytes']:,}" if size != entry["bytes"] else ""


def _verify(path: Path, ranks: Ranks) -> tuple[dict[str, Any], str]:
    """The manifest, and what is wrong with the checkpoint in this rank's share of the files ("": nothing)."""
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(path)
        for entry in manifest["files"][ranks.rank :: ranks.world_size]:
            if complaint := not_whole(path, entry):
                return manifest, complaint
            if sha256_of(path / entry["name"]) != entry["sha256"]:
                return manifest, f"{entry['name']} does not match its SHA-256: it was changed or damaged"
    except (ValueError, OSError, KeyError, TypeError) as error:
        return manifest, str(error) or type(error).__name__
    return manifest, ""


def verify(path: Path, ranks: Ranks) -> tuple[Checkpoint | None, str]:
    """The checkpoint if every rank finds it whole, else None and the first rank's complaint: the same on all ranks.
    ValueError, on all ranks, where they find different ones at that path, or some none."""
    manifest, complaint = _verify(path, ranks)
    said = ranks.gather((manifest.get("sha256"), roll_call.who(ranks.rank), manifest.get("step", "none"), complaint))
    for digest, other, step, _ in said:
        if digest != said[0][0]:
            where = f"{path} of {other} is not that of {said[0][1]}: step {step} there, {said[0][2]} here"
            raise ValueError(f"{where}; give one on a disk that all machines share")
    complaints = [one for *_, one in said if one]
    return (None, complaints[0]) if complaints else (Checkpoint(path, manifest), "")


def newest_good(folder: Path, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that every rank verifies, and why newer ones were skipped.

    Agreed on before any state is touched. Raises ValueError where checkpoints exist and none can be used.
    """
    ranks.together(lambda: _undo_half_replacement(folder) if ranks.first else None)
    skipped: list[str] = []
    for path in ranks.from_first(candidates(folder)):
        found, complaint = verify(path, ranks)
        if found:
            return found, skipped
        skipped.append(f"{path}: {complaint}")
    if skipped:
        raise ValueError(
            "checkpoints exist but none can be used; refusing to start from scratch:\n  "
            + "\n  ".join(skipped)
            + "\nrestore one, or choose another run_dir"
        )
    return None, skipped


def _undo_half_replacement(folder: Path) -> None:
    """A kill between the two renames of save() leaves the old checkpoint of that step under REPLACED: bring it back."""
    for replaced in folder.glob(f"{REPLACED}*"):
        final = folder / replaced.name.removeprefix(REPLACED)
        if not final.exists():
            os.rename(replaced, final)


def file_index(checkpoint: Checkpoint, files: contextlib.ExitStack) -> dict[tuple[str, str], list]:
    """(kind, parameter) -> its pieces as (first element, key, open file). ValueError where a file cannot be read."""
    index = defaultdict(list)
    for entry in checkpoint.manifest["files"]:
        try:
            file = files.enter_context(safe_open(checkpoint.path / entry["name"], framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{checkpoint.path / entry['name']} cannot be read: {error}") from error
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            if not re.fullmatch(r"[^|]+\|[^|]+\|[0-9]{1,18}", key):
                raise ValueError(f"{checkpoint.path / entry['name']} holds {key!r}, which is no part of a state")
            kind, name, start = key.split("|")
            index[kind, name].append((int(start), key, file))
    return index


def _fill(values: torch.Tensor, start: int, pieces: list, what: str) -> None:
    """Copy the overlap of [start, start + len(values)) from pieces; raise ValueError unless all of it was covered."""
    covered = 0
    for first, key, file in pieces:
        length = file.get_slice(key).get_shape()[0]
        low, high = max(start, first), min(start + values.numel(), first + length)
        if low < high:
            values[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])
            covered += high - low
    if covered != values.numel():
        raise ValueError(f"the checkpoint holds {covered} of the {values.numel()} elements of {what} asked for")


def restore(checkpoint: Checkpoint, engine: Any, ema: ShardedEMA) -> None:
    """Bring masters, moments, EMA, weights and averaged networks to the checkpoint's state, bit for bit."""
    with contextlib.ExitStack() as files:
        index = file_index(checkpoint, files)
        for kind, name, start, values in _own_pieces(engine, ema):
            _fill(values, start, index[kind, name], f"{name} ({kind})")
    for flat in masters(engine.optimizer):
        engine.optimizer.optimizer.state[flat]["step"].fill_(checkpoint.manifest["optimizer_step"])
    refresh_weights(engine.optimizer)
    ema.refresh_target()


@torch.no_grad()
def replace_weights(engine: Any, ema: ShardedEMA, weights: Iterable[tuple[str, str, torch.Tensor]]) -> None:
    """Put whole parameters in the places of masters and EMA, bit for bit, and bring the weights to them.

    weights: (kind, name, fp32 values), of which this rank takes its share. kind: "master" (what is trained), or "ema"
    with the trained parameter's name. Moments stay. All ranks call it with the same weights.
    """
    own = defaultdict(list)
    for kind, name, start, values in _own_pieces(engine, ema):
        own[kind, name].append((start, values))
    for kind, name, whole in weights:
        for start, values in own[kind, name]:
            values.copy_(whole.flatten()[start : start + values.numel()])
    refresh_weights(engine.optimizer)
    ema.refresh_target()


def read_weights(checkpoint: Checkpoint, shapes: dict[str, torch.Size], kind: str) -> dict[str, torch.Tensor]:
    """Whole fp32 parameters by name. kind: "master" (what is trained) or "ema" (its average).

    Raises ValueError where one is not there, or is of another size.
    """
    weights = {}
    with contextlib.ExitStack() as files:
        index = file_index(checkpoint, files)
        for name, shape in shapes.items():
            values, pieces = torch.empty(shape.numel()), index[kind, name]
            held = max((first + file.get_slice(key).get_shape()[0] for first, key, file in pieces), default=0)
            if held > shape.numel():  # cut short it would be another network's
                raise ValueError(f"the checkpoint holds {held} elements of {name} ({kind}), asked for {shape.numel()}")
            _fill(values, 0, pieces, f"{name} ({kind})")
            weights[name] = values.view(shape)
    return weights


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))  # fp32; NaN equals itself


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    """Of all of a manifest but the digest itself: a flipped digit of its step would otherwise be believed."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
