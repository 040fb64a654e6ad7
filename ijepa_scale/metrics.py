"""What rank 0 records of a run: metrics.jsonl, wandb, the health of the features, memory.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
import torch.nn.functional as F

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
        # Without a buffer, which would hold what could not be written and fail once more when it is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it must have a "step". NaN and infinity, which JSON lacks, are written as null.

        Raises OSError, which names the file, where the disk is full or fails.
        """
        assert "step" in record, record
        line = memoryview(_json_line(record).encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

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
    if not (is_number(std) and is_number(rank)):
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


def is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _known(history: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in history if is_number(record.get(key))]


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
