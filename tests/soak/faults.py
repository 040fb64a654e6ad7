"""What is done to a job while it runs, and to its files between two starts."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ijepa_scale.engine.checkpoint import candidates
from tests.soak.jobs import Job, alive, kill

DISK_MIB = 48
KEPT = 4  # checkpoints, so that of two damaged in a row a whole one stays


@dataclass
class Site:
    """Where a run lives. disk: a tmpfs of its own, or "" where none can be mounted."""

    run_dir: Path
    source: Path
    clock: Path
    disk: str
    rng: random.Random

    @property
    def checkpoints(self) -> list[Path]:
        return candidates(self.run_dir / "checkpoints")


@dataclass(frozen=True)
class Fault:
    """One kind. act: done to a living job; what follows its yield is done when the job has ended.

    costs: checkpoints that it may cost beside what a kill costs. needs: "disk", "launcher", "clock" or nothing.
    in_folder: done to the folder of a run that trains: where there is none yet when a job looks, it starts anew.
    """

    name: str
    act: Callable[[Site, Job], contextlib.AbstractContextManager[None]]
    costs: int = 0
    needs: str = ""
    in_folder: bool = False

    def possible(self, site: Site) -> bool:
        return not self.in_folder or (site.run_dir / "checkpoints").is_dir()


@dataclass(frozen=True)
class Damage:
    """One kind, done to files where nothing runs. act gives the words of a refusal, or "": it goes on.

    What follows its yield mends what was refused.
    """

    name: str
    act: Callable[[Site], contextlib.AbstractContextManager[str]]
    costs: int = 0


# --- while it runs


@contextlib.contextmanager
def kill_a_rank(site: Site, job: Job) -> Iterator[None]:
    kill(site.rng.choice(job.pids()))
    yield


@contextlib.contextmanager
def kill_the_launcher(site: Site, job: Job) -> Iterator[None]:
    kill(job.launcher)
    yield


@contextlib.contextmanager
def kill_all(site: Site, job: Job) -> Iterator[None]:
    kill(*([job.launcher] if job.launcher else []), *job.pids())
    yield


@contextlib.contextmanager
def stop_a_rank(site: Site, job: Job) -> Iterator[None]:
    """SIGSTOP. When the others have ended it goes on, and finds itself alone."""
    stopped, *others = site.rng.sample(job.pids(), len(job.pids()))
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while any(map(alive, others)) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGCONT)
    yield


def asked_to_stop(number: signal.Signals) -> Callable[[Site, Job], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def act(site: Site, job: Job) -> Iterator[None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(site.rng.choice(job.pids()), number)
        yield

    return act


@contextlib.contextmanager
def full_disk(site: Site, job: Job) -> Iterator[None]:
    """For a while nothing more can be written."""
    ballast = Path(site.disk) / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    time.sleep(site.rng.uniform(0.2, 4))
    ballast.unlink()
    yield


@contextlib.contextmanager
def read_only(site: Site, job: Job) -> Iterator[None]:
    """Checkpoints cannot be written, for a while."""
    folder = site.run_dir / "checkpoints"
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=False)  # busy where something is being written
    time.sleep(site.rng.uniform(0.2, 4))
    subprocess.run(["umount", "--lazy", folder], check=True)
    yield


@contextlib.contextmanager
def vanished(site: Site, job: Job) -> Iterator[None]:
    """The run folder is gone until the job has ended. What it made anew in its place goes."""
    away = site.run_dir.with_name("away")
    site.run_dir.rename(away)
    yield
    shutil.rmtree(site.run_dir, ignore_errors=True)
    away.rename(site.run_dir)


@contextlib.contextmanager
def clock_steps(site: Site, job: Job) -> Iterator[None]:
    for _ in range(3):
        site.clock.write_text(f"{site.rng.choice((-1, 1)) * site.rng.randint(60, 10**6):+d}")
        time.sleep(site.rng.uniform(0.1, 2))
    yield


DURING = (
    Fault("kill -9 of a rank", kill_a_rank),
    Fault("kill -9 of all", kill_all),
    Fault("kill -9 of the launcher", kill_the_launcher, needs="launcher"),
    Fault("SIGSTOP of a rank", stop_a_rank),
    Fault("SIGTERM to a rank", asked_to_stop(signal.SIGTERM)),
    Fault("SIGUSR1 to a rank", asked_to_stop(signal.SIGUSR1)),
    Fault("full disk", full_disk, costs=1, needs="disk"),
    Fault("read-only checkpoints", read_only, costs=1, needs="disk", in_folder=True),
    Fault("vanished run folder", vanished, costs=1, in_folder=True),
    Fault("clock steps", clock_steps, needs="clock"),
)


# --- between two starts


def _of_the_newest(site: Site) -> Path:
    return site.rng.choice([path for path in site.checkpoints[0].iterdir() if path.is_file()])


@contextlib.contextmanager
def flipped_bit(site: Site) -> Iterator[str]:
    path = _of_the_newest(site)
    content = bytearray(path.read_bytes())
    content[site.rng.randrange(len(content))] ^= 1 << site.rng.randrange(8)
    path.write_bytes(content)
    yield ""


@contextlib.contextmanager
def cut_short(site: Site) -> Iterator[str]:
    path = _of_the_newest(site)
    os.truncate(path, site.rng.randrange(path.stat().st_size))
    yield ""


@contextlib.contextmanager
def no_manifest(site: Site) -> Iterator[str]:
    (site.checkpoints[0] / "manifest.json").unlink()
    yield ""


@contextlib.contextmanager
def wrong_pointer(site: Site) -> Iterator[str]:
    pointer = site.run_dir / "checkpoints" / "latest"
    pointer.unlink(missing_ok=True)
    if site.rng.random() < 0.5:
        pointer.write_bytes(site.rng.randbytes(site.rng.randrange(40)))
    yield ""


@contextlib.contextmanager
def torn_record(site: Site) -> Iterator[str]:
    with (site.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 1' + site.rng.randbytes(site.rng.randrange(9)).replace(b"\n", b""))
    yield ""


def _images(site: Site) -> list[Path]:
    return sorted(site.source.rglob("*.png"))


@contextlib.contextmanager
def more_images(site: Site) -> Iterator[str]:
    new = site.source / "train" / "class-0" / "new.png"
    shutil.copy(_images(site)[0], new)
    try:
        yield "restore them"
    finally:
        new.unlink()


@contextlib.contextmanager
def fewer_images(site: Site) -> Iterator[str]:
    lost = site.rng.choice(_images(site))
    kept = site.source.with_name("kept.png")
    lost.rename(kept)
    try:
        yield "restore them"
    finally:
        kept.rename(lost)


@contextlib.contextmanager
def other_images(site: Site) -> Iterator[str]:
    changed = site.rng.choice(_images(site))
    before, status = changed.read_bytes(), changed.stat()
    Image.new("RGB", (50, 50), "red").save(changed)
    try:
        yield "restore them"
    finally:
        changed.write_bytes(before)
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))


BETWEEN = (
    Damage("flipped bit in the newest checkpoint", flipped_bit, costs=1),
    Damage("newest checkpoint cut short", cut_short, costs=1),
    Damage("removed manifest", no_manifest, costs=1),
    Damage("wrong or no latest", wrong_pointer),
    Damage("half a record", torn_record),
    Damage("source gained an image", more_images),
    Damage("source lost an image", fewer_images),
    Damage("source changed an image", other_images),
)
