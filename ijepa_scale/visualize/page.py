"""Sections of words, tables, charts and pictures -> one HTML file that needs nothing else. page.html is its template.

A text is shown as it is: nothing in it is HTML.
"""

import base64
import hashlib
import importlib.resources
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ijepa_scale.visualize.panels import COLOURS, Panel, legend_mark, panel_svg

MAX_PICTURE_BYTES = 6_500_000  # of all files; in base64 a third more, which leaves a page under 10 MB
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Words:
    kind: ClassVar[str] = "words"
    text: str


@dataclass(frozen=True)
class Figures:
    """A few numbers that matter most: (what, value with its unit, a note)."""

    kind: ClassVar[str] = "figures"
    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Command:
    """Lines to type, as they are."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Details:
    """A long text, folded."""

    kind: ClassVar[str] = "details"
    title: str
    text: str


@dataclass(frozen=True)
class Table:
    """The first word of a row is its heading. head: of all columns; of a list of facts empty."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Charts:
    """charts: (heading, SVG)."""

    kind: ClassVar[str] = "charts"
    title: str
    charts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A PNG. step: of the run, where it has one."""

    path: Path
    caption: str
    alt: str
    step: int | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height."""
        with open(self.path, "rb") as file:
            return struct.unpack(">II", file.read(24)[16:])

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Pictures:
    """One picture; or several of the same thing at several steps, of which a slider shows one."""

    kind: ClassVar[str] = "pictures"
    title: str
    frames: Sequence[Frame]


Block = Words | Figures | Command | Details | Table | Charts | Pictures


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def panel_charts(title: str, panels: Sequence[Panel]) -> Charts:
    return Charts(title, [(panel.heading, panel_svg(panel)) for panel in panels])


def render_page(title: str, lead: str, sections: Sequence[Section], runs: Sequence[str] = ()) -> str:
    """The HTML. lead: a sentence below the title. runs: names for a legend, by the numbers of their curves.

    Pictures that would make it too large are left out, and named.
    """
    import jinja2

    source = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(source).render(
        title=title,
        lead=lead,
        sections=_fitting(sections),
        runs=[(name, *legend_mark(number)) for number, name in enumerate(runs)],
        colours=COLOURS,
        script_digest=digest,
    )


def _fitting(sections: Sequence[Section]) -> list[Section]:
    """The sections with as many pictures as fit: fewer steps of each first, the last one to the end."""
    pictures = [block for section in sections for block in section.blocks if isinstance(block, Pictures)]
    longest = max((len(block.frames) for block in pictures), default=1)
    every = 1
    while every < longest and _bytes(pictures, every) > MAX_PICTURE_BYTES:
        every *= 2
    left, fitted = MAX_PICTURE_BYTES, []
    for section in sections:
        blocks: list[Block] = []
        for block in section.blocks:
            if isinstance(block, Pictures):
                frames = _every(block.frames, every)
                size = sum(frame.path.stat().st_size for frame in frames)
                if size > left:
                    blocks.append(Words(f"{block.title}: left out of this page for its size: {frames[-1].path.name}"))
                    continue
                left -= size
                block = Pictures(block.title, frames)
            blocks.append(block)
        fitted.append(Section(section.title, blocks))
    return fitted


def _every(frames: Sequence[Frame], every: int) -> list[Frame]:
    """Each so many steps, counted back from the last."""
    return list(frames)[::-1][::every][::-1]


def _bytes(pictures: Sequence[Pictures], every: int) -> int:
    return sum(frame.path.stat().st_size for block in pictures for frame in _every(block.frames, every))
