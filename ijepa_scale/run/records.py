"""Where the records of a run go: metrics.jsonl, and wandb.

A step record has kind "step" and the keys step, epoch, loss, lr, weight_decay, ema_momentum, grad_norm, context_tokens,
target_tokens, images_per_second, data_wait_seconds, data_wait_worst_seconds, slowest_rank (a name),
slowest_rank_seconds, mean_rank_seconds, step_seconds, memory_bytes, model_flops, hardware_flops,
flops_per_second_per_device and, where the device's peak is known, mfu and hfu; a health record has kind "health" and
step, feature_std, rankme, drift and, where there are labels, knn; one of kind "pictures" their files in RUN/pictures by
title, and the seconds that all of it took.
"""

import json
import math
from pathlib import Path
from typing import Any, Self, TypeGuard

from ijepa_scale.data.files import write_whole


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
        write_whole(path, "".join(_json_line(record) for record in kept))
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

    Keep run_id with the checkpoint and give it back on resume: the run then goes on under the same id. Raises
    ValueError where wandb lets nobody in.
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
        # Nor are its metadata: they hold the command to the letter, with a URL's password.
        settings = wandb.Settings(
            mode=mode,  # type: ignore[arg-type]
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
        )
        # For the process as well as the run: else wandb 0.31 looks its server up for its own statistics, even offline.
        wandb.setup(settings=settings)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(run_dir),
                config=config,
                id=run_id,
                resume="allow",
                settings=settings,
            )
        except wandb.Error as error:  # without a key, or where the server cannot be reached
            raise ValueError(
                f"logging.wandb={mode}: {error}; run `wandb login`, or set logging.wandb=offline"
            ) from error
        self.run_id = self._run.id
        # wandb's own step can only grow: a run resumed at an older step would lose what it logs. Ours may go back.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any], step: int) -> None:
        """Log a record's values against the step."""
        if self._run is not None:
            self._run.log({**record, "step": step})

    def log_pictures(self, pictures: dict[str, Path], step: int) -> None:
        """Log PNGs, by their titles, against the step."""
        if self._run is not None:
            import wandb

            images = {title: wandb.Image(str(path), caption=f"step {step:,}") for title, path in pictures.items()}
            self._run.log({**images, "step": step})

    def finish(self) -> None:
        """Write out what is buffered and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def log_evaluation(checkpoint: Path, task: str, values: dict[str, float]) -> None:
    """Put an evaluation's values into the summary of the wandb run that a checkpoint is of; nothing where it has none.

    checkpoint: a checkpoint folder of a run, or anything else.
    """
    manifest = checkpoint / "manifest.json"
    said = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    logging = said.get("config", {}).get("logging", {})
    if not said.get("wandb_id") or logging.get("wandb", "disabled") == "disabled":
        return
    writer = WandbWriter(
        logging["wandb"],
        project=logging["wandb_project"],
        name=None,
        run_dir=checkpoint.parents[1],
        config={},
        run_id=said["wandb_id"],
    )
    writer.log({f"{task}/{name}": value for name, value in values.items()}, said["step"])
    writer.finish()


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether a record's value is known and finite."""
    return value is not None and math.isfinite(value)
