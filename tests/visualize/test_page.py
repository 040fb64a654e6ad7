"""The page as HTML, and in a browser: nothing asked for, nothing complained of, no fault of accessibility."""

import itertools
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.visualize import page
from ijepa_scale.visualize.page import Charts, Command, Details, Figures, Frame, Pictures, Section, Table, Words
from ijepa_scale.visualize.panels import Curve, Panel
from tests.visualize.browser import NEEDS_CHROMIUM, browser

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\"'&"
AXE = "axe-core@4.14.1"


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_data(self, data):
        self.text += data


def frames(folder, count, side=24):
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [Frame(path=folder / f"{n}.png", caption=f"Caption {n}.", alt=HOSTILE, step=100 * n) for n in range(count)]


def sections(folder, said=HOSTILE):
    """One of each block, with words that are never the same."""
    words = (f"{said} {number}" for number in itertools.count())
    at = np.arange(50.0)
    curves = [Curve(run=run, at=at, values=at * run) for run in range(2)]
    panels = [
        Panel(title=next(words), unit="%", along=next(words), curves=curves, noisy=noisy) for noisy in (True, False)
    ]
    several = frames(folder, 3)
    row = [next(words), "1"]
    told = [Words(next(words)), Figures([(*row, next(words))]), Command(next(words)), Details(*row)]
    tables = [Table(next(words), [next(words), "b"], [row, row]), Table("Facts", [], [[next(words), "x" * 300]])]
    return [
        Section(next(words), told),
        Section("Tables", tables),
        Section("Curves", [page.panel_charts("Learning", panels)]),
        Section("Features", [Pictures(next(words), several), Pictures("One", several[:1])]),
    ]


def test_texts_are_texts(tmp_path):
    found = Elements(page.render_page(HOSTILE, HOSTILE, sections(tmp_path), [HOSTILE, "b"]))
    plain = Elements(page.render_page("a", "a", sections(tmp_path, "a"), ["a", "b"]))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert sum(tag == "script" for tag, _ in found.tags) == 1 and HOSTILE in found.text
    assert len(set(found.ids)) == len(found.ids)
    alts = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert alts == [HOSTILE] * 4


def test_without_a_script_the_last_of_several_steps_is_shown(tmp_path):
    found = Elements(page.render_page("a", "a", sections(tmp_path)))
    figures = [attributes for tag, attributes in found.tags if tag == "figure" and "data-words" in attributes]
    assert [(one["data-words"], "hidden" in one) for one in figures[:3]] == [
        ("step 0", True),
        ("step 100", True),
        ("step 200", False),
    ]


@pytest.mark.parametrize("allowed, steps", [(1.0, 5), (0.7, 3), (0.45, 2), (0.25, 1), (0.1, 0)])
def test_pictures_stay_within_the_page_s_size(tmp_path, monkeypatch, allowed, steps):
    shown = frames(tmp_path, 5)
    sizes = [frame.path.stat().st_size for frame in shown]
    monkeypatch.setattr(page, "MAX_PICTURE_BYTES", int(allowed * sum(sizes)))
    text = page.render_page("a", "a", [Section("Features", [Pictures("Colours", shown)])])
    assert text.count("<img ") == steps
    assert ("left out of this page for its size: 4.png" in text) == (steps == 0)
    assert ("Step 400." in text) == (steps > 0)  # the last is the one to keep


def test_a_chart_is_a_figure_with_a_heading(tmp_path):
    text = page.render_page("a", "a", [Section("Curves", [Charts("Learning", [("loss (%)", "<svg></svg>")])])])
    assert "<figure><figcaption>loss (%)</figcaption><svg></svg></figure>" in text


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.render_page(HOSTILE, HOSTILE, sections(tmp_path), [HOSTILE, "b"]))
    return path


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_it_is_quiet_fits_and_hears_the_keys(tab, written, width):
    tab.open(written, width=width, dark=width == 360)
    assert (tab.complaints(), tab.requests()) == ([], [])
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    shown = "[...document.querySelectorAll('.slider figure')].findIndex(one => !one.hidden)"
    assert tab.evaluate(shown) == 2
    tab.evaluate("document.querySelector('.slider input').focus()")
    tab.press("ArrowLeft")
    assert tab.evaluate(shown) == 1 and tab.evaluate("document.querySelector('output').textContent") == "step 100"
    tab.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    assert (tab.complaints(), tab.requests()) == ([], [])


@NEEDS_CHROMIUM
def test_in_a_browser_without_scripts_and_on_paper_there_is_no_slider(tab, written):
    control = "document.querySelector('.control').getBoundingClientRect().height"
    tab.open(written, script=False)
    assert tab.evaluate(control) == 0
    tab.open(written, media="print", dark=True)
    assert tab.evaluate(control) == 0
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, from npm."""
    if not shutil.which("npm"):
        pytest.skip("needs npm: apt-get install npm")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts", AXE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install {AXE}: {done.stderr.strip().splitlines()[-1:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@NEEDS_CHROMIUM
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_no_fault(tab, written, axe, width, dark):
    tab.open(written, width=width, dark=dark)
    tab.evaluate(axe + "; 0")
    run = "axe.run().then(found => found.violations.map(one => [one.impact, one.id, one.nodes[0].html]))"
    assert tab.evaluate(run) == []
