import contextlib
import io
import math
import os
import pty
import re
import threading

import pytest

from ijepa_scale.run import progress as progress_line
from ijepa_scale.run.progress import Progress

RECORD = {
    "loss": 0.25,
    "lr": 1e-3,
    "images_per_second": 123.4,
    "data_wait_seconds": 0.1,
    "step_seconds": 0.5,
    "memory_bytes": 3 * 2**30,
}


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress_line.time, "monotonic", lambda: self.now)


def test_a_log_file_gets_a_plain_line_every_ten_seconds_and_at_the_end(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(100, stream=stream) as progress:
        for number in range(1, 101):
            clock.now += 1.0
            progress.update(number, RECORD)
            if number == 50:
                progress.message("photos:train: saved [bold]")
    lines = stream.getvalue().splitlines()
    assert "photos:train: saved [bold]" in lines
    lines.remove("photos:train: saved [bold]")
    assert [line.split()[1] for line in lines] == [f"{n}/100" for n in (*range(1, 101, 10), 100)]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert lines[4] == (
        "step 41/100 (41.0%) | ETA 0:00:59 | loss 0.2500 | lr 1.00e-03 | 123.4 images/s | data wait 20% | 3.0 GiB"
    )
    assert lines[-1].startswith("step 100/100 (100.0%) | ETA 0:00:00")


def test_resumed_runs_count_the_steps_that_are_left(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(200_000, 100_000, stream=stream, seconds_between_lines=0.0) as progress:
        clock.now += 20.0
        progress.update(100_010, {"loss": None, "grad_norm": None})
        clock.now += 20.0
        progress.update(100_020, {"loss": 0.5, "mfu": 0.4, "images_per_second": math.nan})
    first, second = stream.getvalue().splitlines()
    assert first == "step 100010/200000 (50.0%) | ETA ?"
    assert second == "step 100020/200000 (50.0%) | ETA 2 days, 7:32:40 | loss 0.5000 | MFU 40.0%"


def test_the_loss_is_smoothed_and_skipped_steps_leave_it(monkeypatch):
    Clock(monkeypatch)
    stream = io.StringIO()
    with Progress(100, stream=stream, seconds_between_lines=0.0) as progress:
        for number, loss in enumerate((1.0, 1.0, 2.0, None, math.nan), start=1):
            progress.update(number, {"loss": loss})
    shown = [float(line.split("loss ")[1]) for line in stream.getvalue().splitlines()]
    assert shown[1] == 1.0 and 1.0 < shown[2] < 2.0 and shown[2] == shown[3] == shown[4]


def on_terminal(work):
    """What `work` writes to a terminal."""
    master, slave = pty.openpty()
    written = bytearray()

    def read():
        try:
            while chunk := os.read(master, 4096):
                written.extend(chunk)
        except OSError:  # the other end was closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stream:
        work(stream)
    reader.join(timeout=10)
    os.close(master)
    return written.decode()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_gets_one_live_line_that_fits(columns, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    clock = Clock(monkeypatch)

    def work(stream):
        with Progress(20, stream=stream) as progress:
            for number in range(1, 21):
                clock.now += 1.0
                progress.update(number, RECORD)
                if number == 10:
                    progress.message("photos:train: saved [bold]")

    text = on_terminal(work)
    assert "\x1b" in text and "photos:train: saved [bold]" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(len(line.rstrip()) for line in lines) <= columns
    assert sum("step 20/20" in line for line in lines) >= 1
    assert plain.count("\n") <= 3  # redrawn in place: a newline for the message and one at the end, not one a step
    assert ("3.0 GiB" in plain) == (columns == 200)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    Clock(monkeypatch)

    def work(stream):
        with Progress(2, stream=stream) as progress:
            progress.update(1, RECORD)

    text = on_terminal(work)
    assert text.startswith("step 1/2") and "\x1b" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_output_that_nobody_reads_any_more_is_noticed_and_raises_nothing(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    clock = Clock(monkeypatch)
    reader, writer = pty.openpty() if terminal else os.pipe()
    with open(writer, "w", encoding="utf-8", closefd=not terminal) as stream:
        with Progress(9, stream=stream) as progress:
            progress.update(1, RECORD)
            assert not progress.lost
            os.close(reader)
            for number in range(2, 5):
                clock.now += 60.0
                progress.update(number, RECORD)
            progress.message("lost")  # at the latest: of a terminal that is gone Rich takes no notice
            words = "Input/output error" if terminal else "Broken pipe"
            assert progress.lost == f"output that cannot be written ({words})"
            progress.message("stopped")
        assert capsys.readouterr().err == "lost\nstopped\n"
        monkeypatch.setattr(progress, "_stream", open("/dev/full", "w", buffering=1))  # noqa: SIM115 - stderr is lost, too
        progress.message("nobody reads this")
        with contextlib.suppress(OSError):
            progress._stream.close()
        with contextlib.suppress(OSError):
            stream.close()


def test_a_process_without_standard_output_is_silent(monkeypatch):
    monkeypatch.setattr(progress_line.sys, "stdout", None)
    with Progress(2) as progress:
        progress.update(1, RECORD)
    assert not progress.lost


def test_batches_are_watched_in_plain_lines_in_a_log_file(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: now[0])
    seen = []
    for batch in progress_line.watched("encoding", range(10)):
        now[0] += 20.0
        seen.append(batch)
    assert seen == list(range(10))
    assert capsys.readouterr().out.splitlines() == [
        *(
            f"encoding: {done} of 10, ETA 0:0{20 * (10 - done) // 60}:{20 * (10 - done) % 60:02}"
            for done in (2, 4, 6, 8)
        ),
        "encoding: done in 0:03:20",
    ]
    assert list(progress_line.watched("reading", iter("ab"))) == ["a", "b"]  # of unknown length
