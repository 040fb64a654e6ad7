"""The progress line: how far a run is, on a terminal or in a log file."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

import rich.progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from ijepa_scale.run.records import is_number

SPEED_SECONDS = 600.0  # what the speed is taken over


class Progress:
    """How far the run is: a live line on a terminal, else a plain line now and then. A context manager, for rank 0.

    stream: where to (default: standard output). Without a terminal a line is written for the first and last step and
    every seconds_between_lines in between, with no control characters: fit for a log file.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self.total_steps = total_steps
        self.lost = ""
        self._stream: TextIO = stream or sys.stdout or io.StringIO()  # a process may be started without any
        self._loss: float | None = None
        self._next_show = 0.0
        console = Console(file=self._stream, emoji=False)  # a name may hold ":train:"
        self._live = self._stream.isatty() and not console.is_dumb_terminal  # which cannot redraw a line
        self._seconds_between = 0.1 if self._live else seconds_between_lines
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(min(40, console.width // 4), table_column=Column(no_wrap=True)),
            _Words(Column(no_wrap=False)),  # the column that becomes narrow where not both fit
            console=console,
            auto_refresh=False,  # no thread: data workers may be forked at any time, and would inherit its locks
            speed_estimate_period=SPEED_SECONDS,
            get_time=time.monotonic,
        )
        self._bar.add_task("", total=total_steps, completed=start_step)
        (self._task,) = self._bar.tasks

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            with self._noticing_a_loss():
                self._bar.stop()

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show that `step` steps are done; record is the step record of the last one (a key it lacks is not shown)."""
        self._bar.update(self._task.id, completed=step)
        loss = record.get("loss")
        if is_number(loss):
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        now = time.monotonic()
        if now < self._next_show and step < self.total_steps:
            return
        self._next_show = now + self._seconds_between
        words = self._words(step, record)
        with self._noticing_a_loss():
            if self._live:
                self._bar.update(self._task.id, description="  ".join(words), refresh=True)
            elif not self.lost:
                self._write(" | ".join(words))

    def message(self, text: str) -> None:
        """Print a line; on a terminal above the live one."""
        lost = self.lost
        with self._noticing_a_loss():
            if self._live:
                self._bar.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
            else:
                self._write(text)
        if self.lost != lost:
            self.message(text)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    @contextlib.contextmanager
    def _noticing_a_loss(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.lost:  # standard error is, too
                return
            self.lost = f"output that cannot be written ({error.strerror})"
            if self._live:
                self._live = False
                with contextlib.suppress(OSError):
                    self._bar.stop()  # gives standard output and error, which it had taken over, back
            if self._stream is sys.stdout:  # what is left in its buffer would fail again when the process ends
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), sys.stdout.fileno())
            self._stream = sys.stderr or io.StringIO()

    def _words(self, step: int, record: dict[str, Any]) -> list[str]:
        left = self._task.time_remaining
        eta = "?" if left is None else timedelta(seconds=left)
        words = [f"step {step}/{self.total_steps} ({self._task.percentage:.1f}%)", f"ETA {eta}"]
        if self._loss is not None:
            words.append(f"loss {self._loss:.4f}")
        if is_number(record.get("lr")):
            words.append(f"lr {record['lr']:.2e}")
        if is_number(record.get("images_per_second")):
            words.append(f"{record['images_per_second']:.1f} images/s")
        if is_number(record.get("mfu")):
            words.append(f"MFU {100 * record['mfu']:.1f}%")
        if is_number(record.get("data_wait_seconds")) and record.get("step_seconds"):
            words.append(f"data wait {100 * record['data_wait_seconds'] / record['step_seconds']:.0f}%")
        if is_number(record.get("memory_bytes")):
            words.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
        return words


class _Words(rich.progress.ProgressColumn):
    """The task's description on one line, cut where it does not fit."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def watched(words: str, batches: Iterable, *, seconds_between_lines: float = 30.0) -> Iterator:
    """The batches, and how far they are: a bar on a terminal, else a plain line now and then, fit for a log file."""
    console = Console(emoji=False)
    if console.is_terminal and not console.is_dumb_terminal:
        yield from rich.progress.track(batches, description=words)
        return
    total = len(batches) if isinstance(batches, Sized) else 0
    started = shown = time.monotonic()
    for done, batch in enumerate(batches):
        now = time.monotonic()
        if now - shown >= seconds_between_lines:
            left = (
                f", ETA {timedelta(seconds=round((now - started) * (total - done) / done))}" if total and done else ""
            )
            print(f"{words}: {done:,}{f' of {total:,}' if total else ''}{left}", flush=True)
            shown = now
        yield batch
    print(f"{words}: done in {timedelta(seconds=round(time.monotonic() - started))}", flush=True)
