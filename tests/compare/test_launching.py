"""Processes of a run: how they are started, watched, stopped, and what is said of their errors."""

import os
import sys
import time
from contextlib import contextmanager

import pytest

from ijepa_scale.compare import launching
from ijepa_scale.compare.recipes import Recipe
from ijepa_scale.compare.runs import Training
from ijepa_scale.run.incidents import RunError


class Stop:
    """A StopRequest that asks after so many looks at it."""

    def __init__(self, after=10**9):
        self.left, self.reason = after, ""

    def pending(self):
        self.left -= 1
        self.reason = "SIGTERM" if self.left < 0 else ""
        return self.reason

    @contextmanager
    def between_steps(self):
        yield


@pytest.fixture
def training(tmp_path):
    recipe = Recipe(name="a", file="tiny", words=("data.workers=0",), config=None, steps=4, flops=1.0)
    return Training(recipe=recipe, seed=3, equal="images", steps=4, probes=2, folder=tmp_path / "a-seed3")


def run(monkeypatch, training, code, stop=None):
    monkeypatch.setattr(launching, "command", lambda *_: [sys.executable, "-c", code])
    seen = []
    return launching.train(training, 1, stop or Stop(), seen.append), seen


FINISH = "import os; os.makedirs({folder!r} + '/checkpoints/step-00000004')"


def test_the_command_is_the_one_that_a_user_would_type(training):
    alone, two = launching.command(training, 1), launching.command(training, 2)
    assert alone[1:6] == ["-m", "ijepa_scale.verbs.command", "pretrain", "--config", "tiny"]
    assert two[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert two[6:11] == ["--module", "ijepa_scale.verbs.command", "pretrain", "--config", "tiny"]
    assert alone[6:] == two[11:] == training.words and training.words[:2] == ["data.workers=0", "seed=3"]


def test_a_run_is_watched_by_its_newest_whole_record(training, monkeypatch):
    write = (
        "import time; file = open({path!r}, 'a')\n"
        'file.write(\'{{"kind": "step", "step": 6}}\\n{{"kind": "health", "step": 7}}\\n{{"kind": "st\')\n'
        "file.flush(); time.sleep(1.0); "
    ).format(path=str(training.folder / "metrics.jsonl"))
    done, seen = run(monkeypatch, training, write + FINISH.format(folder=str(training.folder)))
    assert done is True and seen and all(record == {"kind": "step", "step": 6} for record in seen)


def test_a_run_that_goes_on_is_not_watched_by_what_an_earlier_process_wrote(training, monkeypatch):
    training.folder.mkdir()
    metrics = training.folder / "metrics.jsonl"
    metrics.write_text('{"kind": "step", "step": 9}\n')  # after its last checkpoint
    write = (
        f"import time; time.sleep(1.0); file = open({str(metrics)!r}, 'w')\n"
        'file.write(\'{"kind": "step", "step": 6}\\n\'); file.flush(); time.sleep(1.0); '
    )
    _, seen = run(monkeypatch, training, write + FINISH.format(folder=str(training.folder)))
    assert seen and all(record["step"] == 6 for record in seen)


def test_a_run_that_fails_says_why(training, monkeypatch):
    code = "import sys; print('line'); print('error: no such thing; do this', file=sys.stderr); print('x'); sys.exit(2)"
    with pytest.raises(RunError, match=r"(?s)a-seed3 failed, .*output.log:\nerror: no such thing; do this$"):
        run(monkeypatch, training, code)
    (training.folder / launching.OUTPUT).unlink()
    with pytest.raises(RunError, match=r"(?s)output.log:\n.*ZeroDivisionError: division by zero$"):
        run(monkeypatch, training, "1 / 0")


def test_a_run_that_ends_without_its_last_checkpoint_has_failed(training, monkeypatch):
    with pytest.raises(RunError, match=r"(?s)a-seed3 failed.*\nearly"):
        run(monkeypatch, training, "print('early')")


def test_a_request_to_stop_is_passed_on_and_waited_for(training, monkeypatch):
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.3); print('saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('began', flush=True); time.sleep(60)"
    )
    stop, log = Stop(), training.folder / launching.OUTPUT

    def pending():
        return "SIGTERM" if log.exists() and "began" in log.read_text() else ""

    monkeypatch.setattr(stop, "pending", pending)
    began = time.monotonic()
    done, _ = run(monkeypatch, training, code, stop)
    assert done is False and time.monotonic() - began < 30 and log.read_text() == "began\nsaved\n"


def test_nothing_outlives_an_error_here(training, monkeypatch):
    """As where a second Ctrl-C interrupts."""
    pid = training.folder / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(launching, "command", lambda *_: [sys.executable, "-c", code])

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launching, "last_step", lambda _: pid.exists() and pid.read_text())
    with pytest.raises(KeyboardInterrupt):
        launching.train(training, 1, Stop(), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
