"""CSV, TSV and JSON Lines files that list images: which column holds the paths, and the labels.

In a CSV a field that begins with a quote is quoted, as the standard says. Most writers of TSV quote nothing, so there
such a field is what it is, unless the lines make no rows so. Neither reading may swallow rows: `_quote` decides.
"""

import contextlib
import csv
import functools
import json
import logging
import os
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from ijepa_scale.data.sources.columns import say_chosen, standing
from ijepa_scale.data.sources.folders import warn_once
from ijepa_scale.data.sources.remote import is_remote
from ijepa_scale.data.sources.shards import shard_kind

_log = logging.getLogger(__name__)

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
PATH_COLUMNS = ("image", "image_path", "path", "file_name", "file", "filename", "image_url", "url")  # looked at first
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
_NO_LABEL = ["", "null", "nan"]  # of a text column, in small letters
_NO_NUMBER = [*_NO_LABEL, "na", "n/a", "-nan", "#na", "#n/a", "none"]  # and of one of numbers
_SAMPLED = 64
_BLOCK = 1 << 24  # bytes that pyarrow takes at a time: no row may be longer

_Columns = list[tuple[str, pa.ChunkedArray]]  # a name may come twice


@dataclass(frozen=True)
class ListedImages:
    """paths: absolute, or URLs. labels: a number or a name an image, None where one has none; [] without labels."""

    paths: list[str]
    labels: list[int | str | None]


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_ENDINGS)


def tables_at(folder: str) -> list[str]:
    """The tables in a folder itself, by name."""
    return sorted(name for name in os.listdir(folder) if is_table(name) and not name.startswith("."))


def listed_images(path: str, column: str = "") -> ListedImages:
    """The images that a table lists, by paths relative to the table. ValueError where no column holds such paths.

    column: of the paths; "": found by its name and by what is there.
    """
    stat = os.stat(path)
    try:
        return _listed_images(os.path.abspath(path), column, stat.st_size, stat.st_mtime_ns)
    except UnicodeDecodeError as error:  # pyarrow's JSON takes any bytes for text until they are looked at
        raise ValueError(f"{path} is not UTF-8 text; save the file in that encoding") from error


@functools.lru_cache(maxsize=8)
def _listed_images(path: str, column: str, size: int, changed: int) -> ListedImages:
    try:
        if path.lower().endswith((".csv", ".tsv")):
            table = _delimited(path, "\t" if path.lower().endswith(".tsv") else ",")
        else:
            table = _json_lines(path)
        names = table.column_names
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the first line of {path} is not UTF-8 text; save the file in that encoding") from error
    columns = _utf8(path, list(zip(names, table.columns, strict=True)), column)
    images = [name for name, _ in columns if is_remote(name) or shard_kind(name) == "image"]
    if images:
        raise ValueError(
            f"{path} begins with an image, {images[0]!r}, where the names of columns belong; add a first line such as "
            "path,label"
        )
    return ListedImages(_paths(columns, path, column), _labels(columns, path))


def _json_lines(path: str) -> pa.Table:
    try:
        return pa.json.read_json(path, read_options=pa.json.ReadOptions(block_size=_BLOCK))
    except pa.ArrowInvalid:
        if os.path.getsize(path) == 0:
            raise
    # Perhaps for a column of several types, such as names and NaN: here all are text.
    columns: dict[str, list[str | None]] = {}
    number = 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for at, line in enumerate(file, start=1):
            if line.strip():
                for name, value in _json_row(line, path, at).items():
                    values = columns.setdefault(name, [])
                    values += [None] * (number - len(values))
                    values.append(str(value) if isinstance(value, str | int | float) else None)
                number += 1
    try:
        return pa.table({name: values + [None] * (number - len(values)) for name, values in columns.items()})
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save the file in that encoding") from error


def _json_row(line: str, path: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a table: line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} cannot be read as a table: line {number} is no object with the names of columns")
    return row


def _delimited(path: str, delimiter: str) -> pa.Table:
    """A CSV or TSV, every column as bytes: what pyarrow takes a column for after the first rows need not hold later."""
    quote, fault = _quote(path, delimiter)
    with _opened(path) as file:
        header: list[str] = next(_rows(file, delimiter, quoted=bool(quote), strict=False), [])
    types = {name.encode("utf-8", "surrogateescape"): pa.binary() for name in header}
    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(block_size=_BLOCK),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote, newlines_in_values=bool(quote)),
            convert_options=pa.csv.ConvertOptions(column_types=types),
        )
    except pa.ArrowInvalid as error:
        fault = fault or _read_through(path, delimiter, quoted=bool(quote))[1]
        raise ValueError(f"{path} cannot be read as a table: {fault or error}") from error
    if fault:
        warn_once(f"{path}: {fault}; it is read all the same, and rows near there may have become one")
    return table


def _quote(path: str, delimiter: str) -> tuple[Literal['"', False], str]:
    """What quotes fields, if anything; and what is wrong with the file either way."""
    with open(path, "rb") as file:
        if not any(b'"' in piece for piece in iter(lambda: file.read(1 << 20), b"")):
            return False, ""
    quoted_rows, quoted_fault = _read_through(path, delimiter, quoted=True)
    if delimiter == "," and not quoted_fault:
        return '"', ""
    plain_rows, plain_fault = _read_through(path, delimiter, quoted=False)
    if not plain_fault and (quoted_fault or plain_rows > quoted_rows):
        return False, ""
    return '"', quoted_fault and (plain_fault if delimiter == "\t" else quoted_fault)


def _read_through(path: str, delimiter: str, *, quoted: bool) -> tuple[int, str]:
    """(number of rows, what is wrong with the first that is not whole)."""
    number = 0
    with _opened(path) as file:
        rows = _rows(file, delimiter, quoted=quoted, strict=True)
        try:
            width = len(next(rows, []))
            for row in rows:
                if row and len(row) != width:
                    return number, f"line {rows.line_num} has {len(row)} fields, and the header {width}"
                number += bool(row)
        except csv.Error as error:
            return (
                number,
                f"a quote by the end of line {rows.line_num} has none that closes its field ({error})",
            )
    return number, ""


def _opened(path: str) -> TextIO:
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _rows(file: TextIO, delimiter: str, *, quoted: bool, strict: bool) -> Any:
    csv.field_size_limit(_BLOCK)  # its own is 128 KiB
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(file, delimiter=delimiter, quoting=quoting, strict=strict)


def _utf8(path: str, columns: _Columns, column: str) -> _Columns:
    """The columns, those of bytes as text: those of the images and labels must be, others are left out if they are not.

    ValueError where the column that was chosen is not there.
    """
    if column and column not in (name for name, _ in columns):
        raise ValueError(f"{path} has no column {column!r}; its columns are: {', '.join(name for name, _ in columns)}")
    text: _Columns = []
    for name, values in columns:
        try:
            text.append((name, values.cast(pa.string()) if pa.types.is_binary(values.type) else values))
        except pa.ArrowInvalid as error:
            if name == column or _known(name) in (*PATH_COLUMNS, *LABEL_COLUMNS):
                raise ValueError(
                    f"the column {name!r} of {path} is not UTF-8 text; save the file in that encoding"
                ) from error
    return text


def _known(name: str) -> str:
    return name.strip().lower()  # " Path" is meant as path


def _place(name: str) -> tuple[int, tuple[int, int]]:
    known = PATH_COLUMNS.index(_known(name)) if _known(name) in PATH_COLUMNS else len(PATH_COLUMNS)
    return known, standing(name)


def _paths(columns: _Columns, source: str, column: str) -> list[str]:
    root = os.path.dirname(source)
    texts: dict[str, list[str]] = {}
    for name, values in sorted(columns, key=lambda item: _place(item[0])):
        if (name == column or not column) and _is_text(values.type) and (column or not _is_numbers(values)):
            listed = [value or "" for value in values.to_pylist()]
            texts.setdefault(name, [value if is_remote(value) else os.path.join(root, value) for value in listed])
    chosen = column if column in texts else _found(texts, source)
    if chosen:
        _log.info("%s: the images are those of its column %r", source, chosen)
        _check_single(columns, chosen, source)
        return texts[chosen]
    if column:
        raise ValueError(f"the column {column!r} of {source} holds no text, so no paths of images; choose another")
    first = next(iter(texts.items()), None)
    tried = f"the first value of {first[0]!r} would be {first[1][0]!r}" if first and first[1] else "there are none"
    raise ValueError(
        f"no column of {source} holds paths of existing image files, relative to the table or absolute: {tried}; its "
        f"columns are: {', '.join(name for name, _ in columns)}"
    )


def _found(texts: dict[str, list[str]], source: str) -> str:
    """The column of images among those of text, whose order says which comes first; "" if there is none."""
    for is_image in (os.path.isfile, lambda path: is_remote(path) and shard_kind(path) == "image", is_remote):
        names = [name for name, paths in texts.items() if any(map(is_image, paths[:: max(1, len(paths) // _SAMPLED)]))]
        if len(names) > 1 and is_image is not is_remote:  # links of other kinds need not be to images
            say_chosen(source, names, names[0])
        if names:
            return names[0]
    known = [name for name in texts if _known(name) in PATH_COLUMNS]
    return next((name for name in known if any(map(os.path.isfile, texts[name]))), "")


def _check_single(columns: _Columns, name: str, source: str) -> None:
    if sum(other == name for other, _ in columns) > 1:
        raise ValueError(f"{source} has several columns called {name!r}; give each a name of its own in the first line")


def _labels(columns: _Columns, source: str) -> list[int | str | None]:
    for known in LABEL_COLUMNS:
        for name, values in columns:
            if _known(name) != known:
                continue
            labels = _classes(values)
            if labels is None:
                warn_once(
                    f"{source}: its column {name!r} is not taken for labels: classes are whole numbers, words, or true "
                    "and false, not fractions, dates or lists"
                )
            elif labels.null_count < len(labels):
                _check_single(columns, name, source)
                return labels.to_pylist()
    return []


def _classes(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Numbers or names of classes, null where a cell is empty. None for a column of anything else."""
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "True", "False")  # as a CSV has them
    if not _is_text(values.type):
        return _whole_numbers(values)
    values = pc.utf8_trim_whitespace(values)
    numbers = _without(values, _NO_NUMBER)
    for kind in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowInvalid):  # not of that kind
            return _whole_numbers(numbers.cast(kind))
    return _without(values, _NO_LABEL)


def _without(values: pa.ChunkedArray, words: list[str]) -> pa.ChunkedArray:
    return pc.if_else(pc.is_in(pc.utf8_lower(values), pa.array(words, values.type)), None, values)


def _whole_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Also of floats, which pandas makes of whole numbers where one is missing."""
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return None
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:  # fractions, or larger than any number of a class
        return None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_numbers(values: pa.ChunkedArray) -> bool:
    """Whether the first values of a column of text are all numbers, so no paths."""
    first = [value for value in values[:_SAMPLED].to_pylist() if value]
    try:
        return bool([float(value) for value in first])
    except ValueError:
        return False
