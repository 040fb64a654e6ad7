"""Any damage of any file that images come from: they are read, or said to be bad; no crash, no hang, no loss unsaid."""

import contextlib
import functools
import logging
import resource
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ijepa_scale.data.decoding import BadImageError, decode
from ijepa_scale.data.images import open_images
from ijepa_scale.data.sources.folders import say_once
from ijepa_scale.data.transforms import RandomCrop
from tests.data.small_sources import picture, save_to_disk, write_images, write_jsonl, write_parquet, write_tar

SECONDS, BYTES = 20.0, 2**30  # of this process's CPU; of memory beyond what it has
ROWS = 6
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
drawn = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class LateError(BaseException):
    """Of no kind that a decoder catches."""


@contextlib.contextmanager
def within_bounds() -> Iterator[None]:
    """More memory is refused within it, and after so many seconds it is interrupted: both fail the test."""

    def late(*signal_and_frame: object) -> None:
        raise LateError(f"it takes more than {SECONDS} s")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[str, float, int]]:
    """What befalls a file, by shares of its length: some bytes are others, a part is gone or zero, or one is put in."""
    one = st.tuples(st.sampled_from(["flip", "cut", "zero", "gap", "more"]), st.floats(0, 1), st.integers(1, 255))
    return draw(st.lists(one, min_size=1, max_size=4))


def damaged(content: bytes, befalls: list[tuple[str, float, int]]) -> bytes:
    for what, where, value in befalls:
        at = int(where * max(0, len(content) - 1))
        if what == "flip":
            content = content[:at] + bytes([content[at] ^ value]) + content[at + 1 :] if content else content
        elif what == "cut":
            content = content[:at]
        elif what == "zero":
            content = content[:at] + bytes(min(value, len(content) - at)) + content[at + value :]
        elif what == "gap":
            content = content[:at] + content[at + value :]
        else:
            content = content[:at] + bytes([value]) * value + content[at:]
    return content


def assert_decoded_or_bad(content: bytes) -> None:
    with within_bounds():
        for read in (lambda: decode(content).size, lambda: RandomCrop(16, (0, 1)).of(content).shape):
            try:
                sides = read()
            except Exception as error:  # whatever the bytes lead a decoder to: an ImageSet makes bad images of it
                assert not isinstance(error, MemoryError | RecursionError)
            else:
                assert all(side > 0 for side in sides)


one_image = st.tuples(st.sampled_from(FORMATS), damage())


def file_of(file_format: str) -> bytes:
    import io

    file = io.BytesIO()
    picture(3).convert("RGB").save(file, file_format)
    return file.getvalue()


@drawn(max_examples=40)
@given(case=one_image)
def test_a_damaged_image_is_decoded_or_bad(case):
    assert_decoded_or_bad(damaged(file_of(case[0]), case[1]))


@pytest.mark.slow
@drawn(max_examples=3000)
@given(case=one_image)
def test_a_damaged_image_is_decoded_or_bad_at_length(case):
    assert_decoded_or_bad(damaged(file_of(case[0]), case[1]))


def png(width: int, height: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BOMBS = {
    "a PNG of 60,000 x 60,000": lambda: png(60_000, 60_000, zlib.compress(bytes(10**6), 9)),
    "a PNG of 2**31 x 1": lambda: png(2**31 - 1, 1, zlib.compress(bytes(1000))),
    "a PNG whose pixels go on": lambda: png(8, 8, zlib.compress(bytes(5 * 10**7), 1)),
    "a PNG of no size": lambda: png(0, 0, zlib.compress(b"")),
    "a BMP of 2**30 x 2**30": lambda: file_of("BMP")[:18] + (2**30).to_bytes(4, "little") * 2 + file_of("BMP")[26:],
    "a GIF of 65,535 x 65,535": lambda: file_of("GIF")[:6] + b"\xff" * 4 + file_of("GIF")[10:],
    "a PPM of 10**9 x 10**9": lambda: b"P6\n1000000000 1000000000\n255\n" + bytes(1000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_no_memory(kind):
    assert_decoded_or_bad(BOMBS[kind]())


def table(folder: Path) -> Path:
    write_images(folder / "set", range(ROWS))
    return write_jsonl(folder / "x.jsonl", [{"path": f"set/{i:04}.png", "label": i % 2} for i in range(ROWS)])


def saved(folder: Path) -> Path:
    save_to_disk(folder / "saved", range(ROWS), shards=1)
    return next((folder / "saved").glob("*.arrow"))


SOURCES = {
    "tar": lambda folder: write_tar(folder / "x.tar", range(ROWS)),
    "Parquet": lambda folder: write_parquet(folder / "x.parquet", range(ROWS)),
    "JSON Lines": table,
    "Arrow": saved,
}


def assert_nothing_is_lost_unsaid(kind, befalls, folder, caplog):
    """Every row is an image or a bad one; or the source is refused, or says that it is damaged, by its name."""
    file = SOURCES[kind](folder)
    file.write_bytes(damaged(file.read_bytes(), befalls))
    source = str(file.parent if kind == "Arrow" else file)
    caplog.clear()
    say_once.cache_clear()
    rows = 0
    with within_bounds(), caplog.at_level(logging.INFO, "ijepa_scale"):
        try:
            images = open_images(source, cache_dir=str(folder / "cache"))
            for index in range(len(images)):
                rows += 1
                with contextlib.suppress(BadImageError):
                    images.read(index)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and (file.name in str(error) or source in str(error)), str(error)
            return
    # Of JSON Lines a line may go with its end, and a row of text is nobody's loss but that of its line.
    assert rows >= ROWS or caplog.text or kind == "JSON Lines", (rows, kind, befalls)


one_source = st.tuples(st.sampled_from(sorted(SOURCES)), damage())


@pytest.mark.slow
@drawn(max_examples=250)
@given(case=one_source)
def test_a_damaged_source_loses_nothing_unsaid(tmp_path_factory, monkeypatch, caplog, case):
    folder = tmp_path_factory.mktemp("damaged")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    assert_nothing_is_lost_unsaid(*case, folder, caplog)


def test_damaged_offsets_of_arrow_end_no_process(tmp_path, caplog):
    """Arrow maps a file and believes it: a row was read from wherever they pointed."""
    assert_nothing_is_lost_unsaid(
        "Arrow", [("zero", 0.926506623785866, 107), ("more", 0.9221885624698875, 26)], tmp_path, caplog
    )


def test_a_byte_of_json_lines_that_is_no_text_is_refused_by_name(tmp_path, caplog):
    assert_nothing_is_lost_unsaid("JSON Lines", [("flip", 0.25, 128)], tmp_path, caplog)
