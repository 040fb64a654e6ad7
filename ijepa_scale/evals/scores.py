"""What a probe scores before and after training, as numbers, a table and JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale.data.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

CLEAR = 2.0  # standard errors from which on a difference of scores counts: about 95% confidence


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


def report_table(scores: Sequence[Score]) -> "Table":
    """The scores as a table for the terminal: print it with rich.print or Console.print."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Top-1 accuracy (%) of frozen features, ± one standard error",
        caption=f"better, worse: beyond {CLEAR:g} standard errors; one run, one seed",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # six columns fit into the 80 characters of a log file
    )
    table.add_column("probe")
    for heading in ("chance", "initial", "trained", "difference"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    styles = {"better": "green", "worse": "red"}
    for score in scores:
        table.add_row(
            Text(score.probe),  # with the name of a column, in which brackets are no markup
            f"{score.chance:.1f}",
            f"{score.initial:.1f} ±{score.initial_error:.1f}",
            f"{score.trained:.1f} ±{score.trained_error:.1f}",
            f"{score.difference:+.1f} ±{score.difference_error:.1f}",
            score.verdict,
            style=styles.get(score.verdict),
        )
    return table


def write_report(path: str | Path, scores: Sequence[Score], **facts: Any) -> None:
    """Write the scores as JSON, with whatever else is to stand beside them (step, checkpoint, seed, ...).

    {**facts, "scores": [{probe, chance, initial, initial_error, trained, trained_error, difference, ...}]}.
    The file is replaced in one move: a reader never sees half of it.
    """
    derived = ("initial_error", "trained_error", "difference", "difference_error", "verdict")
    rows = [asdict(score) | {name: getattr(score, name) for name in derived} for score in scores]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**facts, "scores": rows}, indent=2, allow_nan=False) + "\n")
