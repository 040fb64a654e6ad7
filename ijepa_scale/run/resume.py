"""Which checkpoint a run goes on from, whether it fits, and where its streams stood."""

import os
import shutil
from pathlib import Path
from typing import Any

from ijepa_scale import build
from ijepa_scale.config import changed_keys, from_dict
from ijepa_scale.data.streams.dealing import Streams, anew
from ijepa_scale.data.streams.positions import saved_positions
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.run.folder import RunFolder


def find_checkpoint(
    objective: Objective,
    folder: RunFolder,
    ranks: Ranks,
    facts: dict[str, Any],
    stop: int,
    *,
    resume: str,
    allow: bool,
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, verified by all ranks (None: a fresh start), and what to tell the user about it.

    facts: what save_checkpoint() writes of this run beside the state. stop: the step at which the run ends.
    Raises ValueError, on every rank, where a checkpoint does not fit or none of those there can be used.
    """
    own = ranks.from_first(checkpoints.candidates(folder.checkpoints))
    notes: list[str] = []
    if resume == "never":
        if own:
            raise ValueError(
                f"{folder.path} holds checkpoints up to {own[0].name}; for a fresh start choose another run_dir "
                "or delete that folder, to go on leave --resume at auto"
            )
        return None, notes
    path = Path(os.path.expanduser(resume))
    if path.resolve() in (folder.path.resolve(), folder.checkpoints.resolve()):
        resume = "auto"  # from this run itself
    inside = path.parent.resolve() == folder.checkpoints.resolve()
    if resume != "auto" and own and not inside:
        notes.append(f"going on from this run's own checkpoints: {resume} is where it started")
    if resume == "auto" or (own and not inside):
        found, skipped = checkpoints.newest_good(folder.checkpoints, ranks)
        notes += [f"warning: skipped a checkpoint that is not whole: {complaint}" for complaint in skipped]
    else:
        found, complaint = given_checkpoint(path, ranks, notes)
        if found is None:
            raise ValueError(
                f"--resume {resume} cannot be used: {complaint}; give a run folder, or one of its checkpoints as "
                "RUN/checkpoints/step-00001000"
            )
        if found.step >= stop and not inside:
            raise ValueError(f"--resume {resume} is at step {found.step} and this run ends at step {stop}")
    if found is None:
        return None, notes
    refuse_misfit(objective, found, facts, allow=allow)
    before, now = (known.get("packages", {}) for known in (found.manifest, facts))  # older checkpoints have none
    if moved := [f"{name} {old} -> {now[name]}" for name, old in before.items() if now.get(name, old) != old]:
        notes.append(f"computed with other packages from here on: {', '.join(moved)}; roundings may differ")
    later = [other for other in own if other.name > found.path.name] if inside and resume != "auto" else []
    if later:
        ranks.together(lambda: set_aside(later) if ranks.first else None)
        notes.append(f"set aside as abandoned-step-...: {', '.join(other.name for other in reversed(later))}")
    notes.append(f"resumed from {found.path}, step {found.step}")
    return found, notes


def set_aside(paths: list[Path]) -> None:
    """Rename checkpoints that a resume from an older one leaves behind, so that they are not resumed."""
    for path in paths:
        aside = path.with_name(f"abandoned-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)


def given_checkpoint(path: Path, ranks: Ranks, notes: list[str]) -> tuple[Checkpoint | None, str]:
    """A checkpoint that verify() finds whole, or the newest such one of a run folder; else None, and why."""
    for folder in (path / "checkpoints", path):
        if ranks.from_first(checkpoints.candidates(folder)):
            found, skipped = checkpoints.newest_good(folder, ranks)
            notes += [f"warning: skipped a checkpoint that is not whole: {complaint}" for complaint in skipped]
            return found, ""
    return checkpoints.verify(path, ranks)


def refuse_misfit(objective: Objective, found: Checkpoint, facts: dict[str, Any], *, allow: bool) -> None:
    """Raise ValueError for another architecture or objective and, unless allowed, for settings that alter training."""
    named = found.manifest["config"].get("objective", {}).get("name", "ijepa")  # which the oldest do not say
    theirs, ours = found.manifest.get("objective", named), objective.name
    if theirs != ours:
        raise ValueError(f"{found.path} learns another objective: {theirs} there, {ours} here; choose another run_dir")
    refuse_another_architecture(found, facts["architecture"], known=ours in build.OBJECTIVES)
    changed = changed_keys(found.manifest["config"], facts["config"])
    for key in ("images", "precision", *objective.batch_facts(), "streams"):
        if found.manifest.get(key) != facts.get(key):
            changed[key] = (found.manifest.get(key), facts.get(key))
    digests = [known.get("images_digest", "") for known in (found.manifest, facts)]  # older checkpoints have none
    if all(digests) and digests[0] != digests[1]:
        changed["names and contents of images, as SHA-256"] = tuple(digest[:12] for digest in digests)
    if changed and not allow:
        listed = "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"these settings alter training and differ from {found.path}:\n  {listed}\n"
            "restore them, pass --allow-changes to go on all the same, or choose another run_dir"
        )


def refuse_another_architecture(found: Checkpoint, ours: dict[str, Any], *, known: bool) -> None:
    """Raise ValueError where the weights have other shapes. What an older checkpoint lacks is as its config says."""
    theirs = dict(found.manifest["architecture"])
    if known and ours.keys() - theirs.keys():
        theirs = build.build_objective(from_dict(found.manifest["config"])).architecture() | theirs
    differing = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    if differing:
        listed = ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in differing)
        raise ValueError(f"{found.path} holds another architecture: {listed}; choose another run_dir or its config")


def go_on(streams: Streams, found: Checkpoint, notes: list[str]) -> Streams:
    """The streams where a checkpoint left them; anew, and noted, where they were dealt in another way."""
    positions = saved_positions(found.manifest)
    if not positions:
        return streams
    if found.manifest["streams"] == streams.layout():
        return streams.going_on(positions[streams.rank])
    notes.append(
        "warning: shards are dealt in another way than before: every stream starts a new pass over its shards, so some "
        "images come again earlier than others"
    )
    return streams.going_on(anew([position for of_rank in positions for position in of_rank], streams))
