"""A long run takes no more memory, files, threads or time at its end than near its beginning; nor do many starts."""

import os
import statistics
from pathlib import Path

import pytest

from tests.end_to_end.runs import Runs, last_step, steps_of
from tests.processes import assert_all

STEPS, EVERY = 5000, 100
WARM = 1000  # steps, after which nothing may grow any more


def held(pid: int) -> dict[str, float]:
    """Of a process: private memory in MB, open files, threads."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in rollup if line.startswith(("Private_Clean", "Private_Dirty")))
    return {
        "memory": private / 1e3,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def grown(values: list[float]) -> float:
    """The median of the last quarter less that of the first."""
    part = max(1, len(values) // 4)
    return statistics.median(values[-part:]) - statistics.median(values[:part])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_grows_over_5000_steps(small_config, tmp_path, ranks):
    runs = Runs(small_config, tmp_path / "output")
    settings = (f"optimization.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=2")
    processes = runs.start(
        tmp_path / "run", *settings, "logging.health_every_steps=1000", "data.workers=1", ranks=ranks
    )
    found = []
    while processes.running():
        step = last_step(tmp_path / "run")
        if step >= WARM + EVERY * len(found) and step < STEPS - 20:
            found.append([held(processes.pid(rank)) for rank in range(ranks)])
        processes.processes[0].join(0.05)
    assert_all(processes.wait())
    assert len(found) > 20
    for rank in range(ranks):
        # Batches on their way from a loader are open files: ten more or less. One leaked a checkpoint would be thirty.
        for kind, allowed in (("memory", 8.0), ("files", 10.0), ("threads", 0.0)):
            values = [one[rank][kind] for one in found]
            assert grown(values) <= allowed, (rank, kind, values)
    seconds = [record["step_seconds"] for record in timed(tmp_path / "run")][WARM:]
    assert grown(seconds) < 0.5 * statistics.median(seconds), "steps become slower"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "latest",
        f"step-{STEPS - EVERY:08d}",
        f"step-{STEPS:08d}",
    ]


def timed(run_dir: Path) -> list[dict]:
    from ijepa_scale.run.records import read_records

    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "step"]


@pytest.mark.slow
def test_a_hundred_resumes_leave_nothing(small_config, tmp_path):
    """Each takes two more steps; the run folder has the same files after the last as after the third."""
    runs, names, sizes = Runs(small_config, tmp_path / "output"), [], []
    settings = ("optimization.max_steps=1000", "checkpoint.keep_last=2")
    for count in range(1, 101):
        runs(tmp_path / "run", *settings, f"optimization.stop_at_step={2 * count}", ranks=1)
        names.append(sorted(path.name for path in (tmp_path / "run").iterdir()))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*.*")))
    assert len(steps_of(tmp_path / "run")) == 200
    assert all(one == names[2] for one in names[3:]), names[-1]
    assert max(sizes[3:]) - min(sizes[3:]) < 1000, sizes  # the manifest's numbers have more digits
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2
