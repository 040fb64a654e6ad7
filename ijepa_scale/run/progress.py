"""The progress line: how far a run is, on a terminal or in a log file."""

import contextlib
import io
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from ijepa_scale.run.records import is_number

if TYPE_CHECKING:
    from rich.table import Table


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
        self._seconds_between = seconds_between_lines
        self._recent = deque([(time.monotonic(), start_step)], maxlen=50)  # the steps that the speed is taken over
        self._loss: float | None = None
        self._next_show = 0.0
        self._live: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, emoji=False)  # a name may hold ":train:"
            if not console.is_dumb_terminal:  # one that cannot redraw a line
                # No refresh thread: data workers may be forked at any time, and would inherit its locks.
                self._live = Live(console=console, auto_refresh=False)
                self._seconds_between = 0.1

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            with self._noticing_a_loss():
                self._live.stop()

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show that `step` steps are done; record is the step record of the last one (a key it lacks is not shown)."""
        now = time.monotonic()
        self._recent.append((now, step))
        loss = record.get("loss")
        if is_number(loss):
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        if now < self._next_show and step < self.total_steps:
            return
        self._next_show = now + self._seconds_between
        words = self._words(step, record)
        with self._noticing_a_loss():
            if self._live is not None:
                self._live.update(self._bar(step, words), refresh=True)
            elif not self.lost:
                self._write(" | ".join(words))

    def message(self, text: str) -> None:
        """Print a line; on a terminal above the live one."""
        lost = self.lost
        with self._noticing_a_loss():
            if self._live is not None:
                self._live.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
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
            if self._live is not None:
                live, self._live = self._live, None
                with contextlib.suppress(OSError):
                    live.stop()  # gives standard output and error, which it had taken over, back
            if self._stream is sys.stdout:  # what is left in its buffer would fail again when the process ends
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), sys.stdout.fileno())
            self._stream = sys.stderr or io.StringIO()

    def _words(self, step: int, record: dict[str, Any]) -> list[str]:
        words = [f"step {step}/{self.total_steps} ({100 * step / self.total_steps:.1f}%)", f"ETA {self._eta(step)}"]
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

    def _eta(self, step: int) -> str:
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return "?"
        seconds = round((self.total_steps - step) * (last_time - first_time) / (last_step - first_step))
        days, rest = divmod(seconds, 86400)
        return (f"{days}d " if days else "") + f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"

    def _bar(self, step: int, words: list[str]) -> "Table":
        """The bar and as many of the words as fit beside it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        width, shown = self._live.console.width - 1, list(words)
        while len(shown) > 2 and len("  ".join(shown)) + 12 > width:
            shown.pop()
        text = "  ".join(shown)
        bar = ProgressBar(total=self.total_steps, completed=step, width=max(4, min(40, width - len(text) - 2)))
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column()
        line.add_column(no_wrap=True)
        line.add_row(bar, text)
        return line
