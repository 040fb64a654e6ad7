"""A soak: training is hurt at random moments, again and again, and must end as if nothing had happened.

python tests/soak/run.py --seconds 3600 --seed 1 --out /tmp/soak

Runs of a toy model on two ranks, over ZeRO 1 to 3, with and without loader processes and asynchronous checkpoints. A
fault, then the same command again, until the run is finished. Then all losses and weights equal those of an undisturbed
run bit for bit, and nothing is left behind. OUT/faults.jsonl has a line a fault; at the end all of them are a table.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from tests.conftest import SMALL_CONFIG  # noqa: E402
from tests.end_to_end.runs import assert_same_run, last_step, steps_of  # noqa: E402
from tests.processes import end_all  # noqa: E402
from tests.soak.faults import BETWEEN, DISK_MIB, DURING, KEPT, Damage, Fault, Site  # noqa: E402
from tests.soak.jobs import (  # noqa: E402
    FAKETIME,
    LIMIT,
    Forked,
    Job,
    Launched,
    kill,
    left_of,
    wait_for_end,
)

STEPS, EVERY = 240, 10
SETTINGS = (
    f"optimization.max_steps={STEPS}",
    f"checkpoint.every_steps={EVERY}",
    f"checkpoint.keep_last={KEPT}",
    "engine.hang_seconds=10",
)
Kind = TypeVar("Kind", Fault, Damage)
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    """What a fault did. seconds: until the job had ended. failed: what was lost, or "" """

    fault: str
    run: int
    stage: int
    step: int
    launcher: bool
    code: int | None
    seconds: float
    failed: str = ""


class SoakError(Exception):
    """Something was lost, hangs, or is left behind."""


class Soak:
    """Runs under faults, in a folder."""

    def __init__(self, out: Path, seed: int, only: str = "") -> None:
        self.out, self.rng, self.pattern = out, random.Random(seed), only
        self.work = out / f"seed-{seed}"
        shutil.rmtree(self.work, ignore_errors=True)
        self.temporary, self.disk, self.outputs = self.work / "tmp", self.work / "disk", self.work / "output"
        for folder in (self.temporary, self.disk):
            folder.mkdir(parents=True)
        self.source, self.config = self.work / "images", self.work / "small.yaml"
        draw_images(self.source)
        self.config.write_text(SMALL_CONFIG % self.source)
        self.wholes: dict[int, Path] = {}
        self.count = self.starts = 0
        self.lacking = lacking()
        self.outcomes: list[Outcome] = []

    def start(self, run_dir: Path, stage: int, *more: str, launcher: bool = False, clock: Path | None = None) -> Job:
        self.starts += 1
        arguments = ["--config", str(self.config), f"run_dir={run_dir}", f"engine.zero_stage={stage}", *SETTINGS, *more]
        folder = self.outputs / f"{self.starts:05}"
        return Launched(folder, arguments, clock) if launcher else Forked(folder, arguments)

    def whole(self, stage: int) -> Path:
        """An undisturbed run."""
        if stage not in self.wholes:
            run_dir = self.work / f"whole-{stage}"
            job = self.start(run_dir, stage)
            wait_for_end(job)
            end = job.reap()
            assert end.code == 0, end.output
            self.wholes[stage] = run_dir
        return self.wholes[stage]

    def run(self, deadline: float) -> None:
        """One run to its end, under faults; of the stage whose turn it is."""
        stage, self.count = 1 + self.count % 3, self.count + 1
        whole, before = self.whole(stage), shared_memory()
        with small_disk(self.disk, "disk" not in self.lacking):
            disk = "" if "disk" in self.lacking else str(self.disk)
            site = Site(self.disk / "run", self.source, self.work / "clock", disk, self.rng)
            try:
                self.hurt(site, stage, deadline)
                assert_same(site, whole)
                assert_clean(site, self.temporary, before)
            except SoakError:
                shutil.copytree(self.disk, self.work / f"failed-{self.count}", dirs_exist_ok=True)
                raise

    def hurt(self, site: Site, stage: int, deadline: float) -> None:
        stopped, slack, ended = False, 1, False
        while not ended:
            spared = time.monotonic() > deadline  # to the end, undisturbed
            if not spared and self.rng.random() < 0.5 and len(site.checkpoints) == KEPT:
                costs = self.damage(site, stage)
                slack, stopped = slack + costs, stopped and not costs  # a stop's checkpoint may be the damaged one
            ended, stopped, slack = self.attempt(site, stage, stopped, slack, hurt=not spared)

    def damage(self, site: Site, stage: int) -> int:
        """Between two starts; returns how many checkpoints it may have cost."""
        if (damage := self.one_of(BETWEEN)) is None:
            return 0
        step, started, code = last_step(site.run_dir), time.monotonic(), None
        with damage.act(site) as words:
            if words:
                job = self.start(site.run_dir, stage)
                waited = wait_for_end(job)
                end = job.reap()
                code = end.code
                if not waited.in_time:
                    raise SoakError(f"{damage.name}: it hangs")
                if code != 2 or words not in end.output:
                    raise SoakError(f"{damage.name}: not refused, but exit code {code}: {end.output[-2000:]}")
        self.note(Outcome(damage.name, self.count, stage, step, False, code, time.monotonic() - started))
        return damage.costs

    def attempt(self, site: Site, stage: int, stopped: bool, slack: int, *, hurt: bool) -> tuple[bool, bool, int]:
        """Start, hurt, wait. Returns (whether the run is finished, was stopped with a checkpoint, the next slack).

        slack: how many checkpoint intervals may be repeated; none where it was stopped.
        """
        fault = self.choose() if hurt and self.rng.random() < 0.9 else None
        needs = fault.needs if fault else ""
        # While a job is set up a lost rank is waited for, for minutes: it is the launcher that ends the others.
        early = fault is not None and not fault.in_folder and self.rng.random() < 0.15
        launcher = needs in ("launcher", "clock") or early
        site.clock.write_text("+0")
        aside = self.rng.random() < 0.5
        workers = 0 if needs == "clock" else self.rng.randrange(2)  # libfaketime's locks do not outlive a fork
        more = (f"checkpoint.asynchronous={str(aside).lower()}", f"data.workers={workers}")
        recorded, had = last_step(site.run_dir) + 1, bool(site.checkpoints)
        clock = site.clock if needs == "clock" else None
        job = self.start(site.run_dir, stage, *more, launcher=launcher, clock=clock)
        hit, step, started = False, -1, time.monotonic()
        with contextlib.ExitStack() as stack:
            if fault is not None and self.wait_for_moment(job, site, recorded, early) and fault.possible(site):
                hit, step, started = True, last_step(site.run_dir), time.monotonic()
                stack.enter_context(fault.act(site, job))
            waited = wait_for_end(job)
            end = job.reap()
        if hit and fault:
            self.note(Outcome(fault.name, self.count, stage, step, launcher, end.code, time.monotonic() - started))
        if not waited.in_time:
            raise SoakError(f"{fault and fault.name}: it hangs: {end.output[-2000:]}")
        if left := left_after(self.outputs):
            raise SoakError(f"{fault and fault.name}: processes {left} live on")
        if (found := re.search(r"resumed from \S+, step (\d+)", end.output)) is not None:
            repeated = recorded - int(found[1])
            if repeated > (0 if stopped else slack * EVERY):
                raise SoakError(f"{repeated} steps were repeated, {slack} intervals are allowed")
            slack = 1
        elif had and "resum" not in end.output and last_step(site.run_dir) + 1 < recorded - slack * EVERY:
            raise SoakError(f"started anew: {end.output[-2000:]}")
        finished = end.code == 0
        if not hit and not finished:
            raise SoakError(f"undisturbed, it ended with {end.code}: {end.output[-2000:]}")
        if hit and fault and end.code == 2:
            raise SoakError(f"{fault.name}: the command was refused: {end.output[-2000:]}")
        costs = len(set(re.findall(r"no checkpoint at step \d+", end.output)))  # a disk may be bad for several
        return finished, end.code == 75, slack + aside + max(costs, fault.costs if hit and fault else 0)

    def choose(self) -> Fault | None:
        return self.one_of([fault for fault in DURING if fault.needs not in self.lacking])

    def one_of(self, kinds: Sequence[Kind]) -> Kind | None:
        """Of those that --only takes."""
        asked = [kind for kind in kinds if not self.pattern or re.fullmatch(self.pattern, kind.name)]
        return self.rng.choice(asked) if asked else None

    def wait_for_moment(self, job: Job, site: Site, recorded: int, early: bool) -> bool:
        """A random moment of a job: while it is set up, or from a random step on. False: it has ended before."""
        if early:
            step, seconds = -1, self.rng.uniform(0, 15)
        else:
            step, seconds = recorded + self.rng.randrange(45), self.rng.uniform(0, 0.2)
        deadline = time.monotonic() + LIMIT
        while not job.ended() and time.monotonic() < deadline:
            if job.pids() and last_step(site.run_dir) >= step:
                time.sleep(seconds)
                break
            time.sleep(0.005)
        return not job.ended() and bool(job.pids())

    def note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        with (self.out / "faults.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(
            f"{time.strftime('%H:%M:%S')} fault {len(self.outcomes)}, run {self.count}, ZeRO-{outcome.stage}"
            f"{', torchrun' * outcome.launcher}, after step {outcome.step + 1}: {outcome.fault}: "
            f"exit code {outcome.code} after {outcome.seconds:.1f} s",
            flush=True,
        )

    def fail(self, words: str) -> None:
        """What the newest fault has led to."""
        kept = self.work / f"failed-{self.count}"
        print(f"FAILED, run {self.count} (kept in {kept}, output {self.starts:05}): {words}", flush=True)
        newest = self.outcomes[-1] if self.outcomes else Outcome("none", self.count, 0, 0, False, None, 0.0)
        with (self.out / "faults.jsonl").open("a") as file:
            file.write(json.dumps({**asdict(newest), "failed": words.splitlines()[0][:200]}) + "\n")


def draw_images(folder: Path) -> None:
    for i in range(64):
        path = folder / "train" / f"class-{i % 4}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)


def lacking() -> dict[str, str]:
    """What faults need that is not here, and why."""
    found = {}
    if os.geteuid() != 0:
        found["disk"] = "not root: no small disk can be mounted"
    if not FAKETIME:
        found["clock"] = "libfaketime is not installed: clocks cannot step"
    return found


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


@contextlib.contextmanager
def small_disk(folder: Path, mounted: bool) -> Iterator[None]:
    """An empty folder; where it can be, a tmpfs of its own."""
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "soak", folder], check=True)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
        else:
            shutil.rmtree(folder)
            folder.mkdir()


def left_after(outputs: Path, seconds: float = 5) -> list[int]:
    """Processes of a job that live on after its ranks."""
    deadline = time.monotonic() + seconds
    while (left := left_of(outputs)) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(*left)
    return left


def assert_same(site: Site, whole: Path) -> None:
    """The run equals an undisturbed one."""
    try:
        assert_same_run(site.run_dir, whole, STEPS)
        assert len(steps_of(site.run_dir)) == STEPS
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1].line
        raise SoakError(f"the run differs from an undisturbed one: {where}: {str(error)[:300]}") from error


def assert_clean(site: Site, temporary: Path, before: set[str]) -> None:
    """Of a run that has finished nothing is left but its folder."""
    left = [str(path) for path in temporary.iterdir()]
    # Of processes that were killed, which cannot clean up: torchrun's logs, and the socket of a loader process.
    left = [path for path in left if not Path(path).name.startswith(("torchelastic_", "pymp-"))]
    left += [str(SHARED_MEMORY / name) for name in shared_memory() - before]
    left += [str(path) for path in site.run_dir.rglob(".*partial*")]
    if left:
        raise SoakError(f"left behind: {left}")


def table(out: Path) -> str:
    """Of all faults so far, in Markdown."""
    lines = (out / "faults.jsonl").read_text().splitlines() if (out / "faults.jsonl").exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = ["| fault | times | lost or hung | longest, in s, until all ranks had ended |", "|---|---|---|---|"]
    for name in [one.name for one in (*DURING, *BETWEEN)]:
        done = [record for record in records if record["fault"] == name and not record["failed"]]
        failed = sum(record["fault"] == name and bool(record["failed"]) for record in records)
        if done or failed:
            short = [record["seconds"] for record in done if record["code"] != 0]
            rows.append(f"| {name} | {len(done)} | {failed} | {max(short, default=0):.0f} |")
    total = sum(not record["failed"] for record in records)
    failed = sum(bool(record["failed"]) for record in records)
    return "\n".join([*rows, f"| **all** | **{total}** | **{failed}** | |"])


def soak(out: Path, seconds: float, seed: int, only: str = "") -> int:
    """How many of the runs failed."""
    one, failed = Soak(out, seed, only), 0
    os.environ["TMPDIR"] = str(one.temporary)
    for reason in one.lacking.values():
        print(f"left out: {reason}", flush=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            one.run(deadline)
        except SoakError as error:
            one.fail(str(error))
            failed += 1
        except Exception:
            one.fail(traceback.format_exc())
            raise
        finally:
            end_all()
    print(f"{len(one.outcomes)} faults in {one.count} runs, {failed} failed")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose whole name it matches")
    parser.add_argument("--out", type=Path, default=Path("/tmp/soak"))
    options = parser.parse_args()
    if (
        os.geteuid() == 0 and "IJEPA_SOAK" not in os.environ
    ):  # disks are mounted for this process and its children alone
        os.environ["IJEPA_SOAK"] = "1"
        own = 'mount -t tmpfs soak /dev/shm && exec "$@"'  # of shared memory too: others' files are not looked at
        os.execvp(
            "unshare",
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", own, "sh", sys.executable, *sys.argv],
        )
    options.out.mkdir(parents=True, exist_ok=True)
    failed = soak(options.out, options.seconds, options.seed, options.only)
    print(table(options.out))
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
