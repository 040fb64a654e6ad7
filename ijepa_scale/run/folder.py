"""A run's folder: who owns it, what was run, and which images could not be read."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from ijepa_scale.config.redaction import redacted, without_secrets
from ijepa_scale.data.files import remove_leftovers, write_whole

PACKAGES = ("torch", "deepspeed", "triton", "datasets", "numpy", "pillow", "ijepa-scale")


class RunFolder:
    """RUN/: config.yaml, environment.json, metrics.jsonl, checkpoints/, pictures and report.json."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self._lock: TextIO | None = None

    @property
    def gone(self) -> bool:
        """Whether what this process has locked is not at its path any more: moved, deleted, or its disk unmounted."""
        if self._lock is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock"))
        except OSError:
            return True

    def lock(self) -> None:
        """Claim the folder for this process until it ends. Raises ValueError naming the process that has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
        try:
            # A record lock ends with this process; flock's would live on in the loader workers of a killed one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.readline().strip() or "another process"
            file.close()
            raise ValueError(f"run_dir {self.path} is in use by {owner}; stop it or choose another run_dir") from None
        file.truncate(0)
        file.write(f"{socket.gethostname()}, pid {os.getpid()}\n{uuid.uuid4().hex}\n")  # the latter tells runs apart
        file.flush()
        self._lock = file
        remove_leftovers(self.path)

    def owner(self) -> str:
        """What lock() wrote; "" where nothing has."""
        if self._lock is not None:  # another file object on it, when it is closed, would end the lock
            self._lock.seek(0)
            return self._lock.read()
        try:
            return (self.path / ".lock").read_text(encoding="utf-8")
        except OSError:
            return ""

    def set_aside_report(self, start_step: int) -> None:
        """Where a run goes back behind its report, or starts anew: report.json becomes report.json.old, its PNGs go.

        So do results of evaluations of later steps: those will be of other weights.
        """
        for results in self.path.glob("evaluations/*/results.json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # whatever it is, the page leaves it out
                if json.loads(results.read_text(encoding="utf-8"))["step"] > start_step:
                    results.replace(results.with_suffix(".json.old"))
        report = self.path / "report.json"
        try:
            done = int(json.loads(report.read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):  # whatever it is, it is not of this run
            done = start_step + 1
        if done > start_step or start_step == 0:
            report.replace(self.path / "report.json.old")
            for name in ("scores.png", "loss_curve.png"):
                (self.path / name).unlink(missing_ok=True)

    def describe(self, config_yaml: str, **facts: Any) -> None:
        """Write the resolved config, and what ran it: versions, git revision, command, device."""
        write_whole(self.path / "config.yaml", config_yaml)
        environment = {
            "command": redacted(sys.argv),
            "python": platform.python_version(),
            "packages": {name: version_of(name) for name in PACKAGES},
            "git_revision": _git_revision(),
            "host": socket.gethostname(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            **without_secrets(facts),
        }
        write_whole(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")


class BadImages:
    """The unreadable images that a run has met, by index and name: the same on all ranks, and through restarts."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        """records: what earlier parts of the run wrote to metrics.jsonl."""
        bad = [record for record in records if record.get("kind") == "bad_image"]
        self.known = {(record["index"], record["sample"]): record for record in bad}

    def add(self, step: int, bad: Iterable[tuple[int, str, str]]) -> list[dict[str, Any]]:
        """Take up (index, sample id, reason) triples; returns a record for each that is new."""
        new = []
        for index, sample, reason in sorted(set(bad)):
            said = without_secrets(sample)  # as the records have it
            if (index, said) not in self.known:
                record = {"kind": "bad_image", "step": step, "index": index, "sample": said, "reason": reason}
                self.known[index, said] = record
                new.append(record)
        return new


def version_of(package: str) -> str:
    """An installed package's version, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str:
    """This source tree's revision, with "+changes" where it differs from it; "" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def ask(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", __file__)  # else it is installed in somebody's checkout
        return ask("rev-parse", "HEAD") + ("+changes" if ask("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
