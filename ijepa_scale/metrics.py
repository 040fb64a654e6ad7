"""What rank 0 says about a run: metrics.jsonl, wandb, the health of the features, memory, and the progress line.

A step record has kind "step" and the keys step, epoch, loss, lr, weight_decay, ema_momentum, grad_norm, context_tokens,
target_tokens, images_per_second, data_wait_seconds, step_seconds, memory_bytes, model_flops,
flops_per_second_per_device and, where the device's peak is known, mfu and hfu; a health record has kind "health" and
step, feature_std, rankme, drift and, where there are labels, knn.
"""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeGuard

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from rich.table import Table

# Health: below these the words change. Each is far from what a run that learns has shown, so that a warning means it.
CONSTANT_STD = 0.01  # features vary by 1% of their size: no probe reads more from them than from rounding
STD_FALL = 0.2  # of the first record: five times as alike as at the start
RANK_FALL = 0.7  # of the first record: 0.6 to 0.34 from a third of runs that did not learn on, 9 in one that did
RANK_RECOVERY = 1.2  # of the lowest so far: the early dip is over
KNN_FALL = 6.0  # percent points: two standard errors of 30% on 256 images, half of what a health check looks at
LOSS_RISE = 1.1  # of the lowest so far
CLEAR = 2.0  # standard errors from which on a difference of scores counts: about 95% confidence
COLLAPSE_HELP = (  # the weights of configs/tiny.yaml
    "small runs need loss.variance=0.02 loss.covariance=0.004 (for 300 steps; longer runs, less): see "
    "docs/small_compute.md"
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One probe's accuracy in percent, on the same num_test test images, before and after training."""

    probe: str  # "k-NN count", "linear distance", ...
    initial: float
    trained: float
    chance: float
    num_test: int

    @property
    def initial_error(self) -> float:
        """Binomial standard error, in percent points, as are the two below."""
        return math.sqrt(self.initial * (100.0 - self.initial) / self.num_test)

    @property
    def trained_error(self) -> float:
        return math.sqrt(self.trained * (100.0 - self.trained) / self.num_test)

    @property
    def difference(self) -> float:
        return self.trained - self.initial

    @property
    def difference_error(self) -> float:
        """As if the two scores were of different images: an upper bound as long as their errors go together."""
        return math.hypot(self.initial_error, self.trained_error)

    @property
    def verdict(self) -> str:
        if abs(self.difference) <= CLEAR * self.difference_error:
            return "no clear difference"
        return "better" if self.difference > 0 else "worse"


class JsonlWriter:
    """Appends records to a file, one JSON object a line, each on disk's doorstep (flushed) when write() returns.

    resume_step None starts the file afresh. An int keeps the records of steps before it, as a run that was restored
    at that step will write the others again; a half last line, from a run that was killed, goes.
    """

    def __init__(self, path: str | Path, resume_step: int | None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_records(path) if record["step"] < resume_step]
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_json_line(record) for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it must have a "step". NaN and infinity, which JSON lacks, are written as null."""
        assert "step" in record, record
        self._file.write(_json_line(record))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. A half last line is left out; half a line elsewhere is an error."""
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:  # a cut line may also end inside a UTF-8 character
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON ({error}); remove the line") from error
    return records


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Scalars of NumPy and torch as Python's, and what is not a finite number as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class WandbWriter:
    """The same records in Weights & Biases. "offline" writes to run_dir/wandb, for `wandb sync`; "disabled" is silent.

    Keep run_id with the checkpoint and give it back on resume: the run then goes on under the same id.
    """

    def __init__(
        self,
        mode: str,
        *,
        project: str,
        name: str | None,
        run_dir: str | Path,
        config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        if mode not in ("disabled", "offline", "online"):
            raise ValueError(f"wandb mode must be disabled, offline or online, got {mode!r}")
        self.run_id = run_id
        self._run: Any = None
        if mode == "disabled":
            return
        import wandb

        # Nothing is taken from the terminal: its progress line is no log, and wandb's own words would tear it.
        settings = wandb.Settings(mode=mode, silent=True, console="off", disable_git=True, disable_code=True)  # type: ignore[arg-type]
        # For the process as well as the run: else wandb 0.31 looks its server up for its own statistics, even offline.
        wandb.setup(settings=settings)
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(run_dir),
            config=config,
            id=run_id,
            resume="allow",
            settings=settings,
        )
        self.run_id = self._run.id
        # wandb's own step can only grow: a run resumed at an older step would lose what it logs. Ours may go back.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any], step: int) -> None:
        """Log a record's values against the step."""
        if self._run is not None:
            self._run.log({**record, "step": step})

    def finish(self) -> None:
        """Write out what is buffered and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def feature_std(features_ND: torch.Tensor) -> float:
    """Standard deviation over the images, averaged over the dimensions, relative to the features' root mean square.

    features_ND: (num_images, D). 0 when all images have the same feature (collapse), about 1 when they have nothing in
    common; the scale of the features cancels, so runs and sizes compare. NaN if a feature is not finite.
    """
    features = features_ND.double()
    rms = features.square().mean().sqrt()
    return (features.std(dim=0, correction=0).mean() / rms).item() if rms != 0 else 0.0


def rankme(features_ND: torch.Tensor, eps: float = 1e-7) -> float:
    """Effective rank: exp of the entropy of the singular values, as shares of their sum (RankMe, arXiv:2210.02885).

    features_ND: (num_images, D), not centred, as in the paper. From 1 (all features on one line: collapse) to
    min(num_images, D). It grows with num_images: compare only values taken over equally many. NaN if not finite.
    """
    if not bool(torch.isfinite(features_ND).all()):
        return math.nan
    singular = torch.linalg.svdvals(features_ND.float())
    if singular[0] == 0:
        return 1.0
    shares = (singular / singular.sum()).double() + eps
    return torch.exp(-(shares * shares.log()).sum()).item()


def drift(target_ND: torch.Tensor, context_ND: torch.Tensor) -> float:
    """1 - mean cosine between the two encoders' features of the same images, each less its mean over the images.

    0: the target encoder is where the context encoder is (EMA has caught up); 1: unrelated. Centred, since the part
    that all images share is most of a feature and would hide what sets them apart. Both are (num_images, D).
    """
    target, context = target_ND.double(), context_ND.double()
    cosine = F.cosine_similarity(target - target.mean(dim=0), context - context.mean(dim=0), dim=1)
    return 1.0 - cosine.mean().item()


def health_verdict(history: list[dict[str, Any]]) -> str:
    """One line on the features' health, from a run's health records, the first taken at or near initialisation.

    It begins with "healthy", "watch", "likely collapse" or "collapsed", or says that it is too early to tell.
    Used are feature_std, rankme and, if recorded, knn (percent) and loss; a null is as not recorded, save in the last
    record, where it means that the features are not finite.
    """
    if not history:
        return "no health record yet"
    last = history[-1]
    std, rank = last["feature_std"], last["rankme"]
    if not (_is_number(std) and _is_number(rank)):
        return "collapsed: features are not finite: resume an older checkpoint with a lower optimization.lr"
    if std < CONSTANT_STD:
        return f"collapsed: features constant over the images (std {std:.4f}): {COLLAPSE_HELP}"
    stds, ranks, knns, losses = (_known(history, key) for key in ("feature_std", "rankme", "knn", "loss"))
    if len(stds) < 2 or len(ranks) < 2:
        return f"first record: feature std {std:.3f}, rank {rank:.1f}; later ones are compared with it"

    facts = [f"feature std {stds[0]:.3f} -> {std:.3f}", f"rank {ranks[0]:.1f} -> {rank:.1f}"]
    if len(knns) > 1:
        facts.append(f"k-NN {knns[0]:.1f}% -> {knns[-1]:.1f}%")
    note = "; loss rising is normal here" if len(losses) > 1 and losses[-1] > LOSS_RISE * min(losses) else ""
    said = ", ".join(facts) + note
    if rank < RANK_FALL * ranks[0]:
        if rank > RANK_RECOVERY * min(ranks):
            return f"watch: rank fell to {min(ranks):.1f} and is rising again: {said}"
        return f"likely collapse: rank is falling: {said}: {COLLAPSE_HELP}"
    if std < STD_FALL * stds[0]:
        return f"likely collapse: features grow alike: {said}: {COLLAPSE_HELP}"
    if len(knns) > 1 and knns[-1] < knns[0] - KNN_FALL:
        return f"watch: k-NN is below its first value: {said}"
    return f"healthy: {said}"


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _known(history: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in history if _is_number(record.get(key))]


def memory_bytes() -> int:
    """The most memory used so far: if it uses CUDA that of this process's tensors on its device, else its resident set.

    CUDA's is PyTorch's max_memory_allocated(): fragmentation and the context (nvidia-smi shows them) come on top.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak starts, on Linux, at the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


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
        self._stream = stream if stream is not None else sys.stdout
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
            self._live.stop()

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show that `step` steps are done; record is the step record of the last one (a key it lacks is not shown)."""
        now = time.monotonic()
        self._recent.append((now, step))
        loss = record.get("loss")
        if _is_number(loss):
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        if now < self._next_show and step < self.total_steps:
            return
        self._next_show = now + self._seconds_between
        words = self._words(step, record)
        if self._live is not None:
            self._live.update(self._bar(step, words), refresh=True)
        else:
            self._stream.write(" | ".join(words) + "\n")
            self._stream.flush()

    def message(self, text: str) -> None:
        """Print a line; on a terminal above the live one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _words(self, step: int, record: dict[str, Any]) -> list[str]:
        words = [f"step {step}/{self.total_steps} ({100 * step / self.total_steps:.1f}%)", f"ETA {self._eta(step)}"]
        if self._loss is not None:
            words.append(f"loss {self._loss:.4f}")
        if _is_number(record.get("lr")):
            words.append(f"lr {record['lr']:.2e}")
        if _is_number(record.get("images_per_second")):
            words.append(f"{record['images_per_second']:.1f} images/s")
        if _is_number(record.get("mfu")):
            words.append(f"MFU {100 * record['mfu']:.1f}%")
        if _is_number(record.get("data_wait_seconds")) and record.get("step_seconds"):
            words.append(f"data wait {100 * record['data_wait_seconds'] / record['step_seconds']:.0f}%")
        if _is_number(record.get("memory_bytes")):
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
