"""YAML and key.sub=value overrides -> frozen dataclasses, of whatever keys and types these declare.

A text key is one that is declared str, or Any: text or a list. What is typed for it on the command line is its value,
to the letter; in a file YAML decides what is text, and what is none is refused rather than printed back as text.
"""

import contextlib
import difflib
import functools
import json
import os.path
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

NUMBERS_TOO = {"numbers too": True}  # metadata of a text key whose words include whole numbers
LARGEST = 1e30  # of fractions, which are computed with in fp32
FREE = {"free": True}  # metadata of a key, or of a section with all its keys, that may change on resume


def read(schema: type[T], path: Path, overrides: list[str], names: Mapping[str, str] | None = None) -> T:
    """The values of a YAML file under those of overrides. names: of renamed(), for the file.

    Raises ValueError for all that a user can get wrong.
    """
    try:
        path.read_bytes().decode()
        with _naming(str(path)):
            user: Any = OmegaConf.load(path)
        if isinstance(user, DictConfig):
            given = typing.cast(dict, OmegaConf.to_container(user))
            if (values := renamed(given, names or {})) != given:
                user = OmegaConf.create(values)
            user = OmegaConf.merge(user, _overrides(schema, overrides))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} in line {line}; save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} or an override is not valid YAML: {' '.join(str(error).split())}") from error
    except (OmegaConfBaseException, OSError, TypeError) as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    if not isinstance(user, DictConfig):
        raise ValueError(f"{path} must hold sections of keys, got a {type(user).__name__}")
    return _typed(schema, user, path)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """YAML's reading of a number of thousands of digits, or of a date of no calendar, raises a bare ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error


def from_literal(schema: type[T], values: dict[str, Any]) -> T:
    """The dataclass that holds these values, to the letter; raises ValueError as read() does."""
    _check_keys(schema, values, schema)
    return _typed(schema, OmegaConf.create(_literal(values)), None)


def over(settings: T, overrides: list[str]) -> T:
    """The same settings, a dataclass of plain values, with key=value words over them. Raises ValueError as read()."""
    schema, held = type(settings), asdict(typing.cast(Any, settings))
    try:
        words = _overrides(schema, overrides)
        given = typing.cast(dict, OmegaConf.to_container(words))
        _check_keys(schema, given, schema)
        for key, value in given.items():
            if isinstance(held[key], tuple) and not isinstance(value, list):
                raise ValueError(
                    f"config key {key} is a list: give {key}=[{'...' if isinstance(value, dict) else value}]"
                )
        values = OmegaConf.merge(OmegaConf.create(_literal(held)), words)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{' '.join(overrides)}: {_first_line(error)}") from error
    return _typed(schema, typing.cast(DictConfig, values), None)


def _typed(schema: type[T], user: DictConfig, path: Path | None) -> T:
    """The dataclass that holds the values; ${...} in them is resolved. path: the file they are from, for messages."""
    values = typing.cast(dict, OmegaConf.to_container(user))
    _check_keys(schema, values, schema)
    _check_texts(schema, values, path)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_structured(typing.cast(Any, schema)), user))
    except (OmegaConfBaseException, TypeError) as error:
        key = _key_of_failure(schema, values) or getattr(error, "full_key", None)
        raise ValueError(f"config key {key}: {_first_line(error)}") from error
    assert isinstance(config, schema)
    _check_numbers(asdict(typing.cast(Any, config)))
    return config


def _check_numbers(values: Any, key: str = "") -> None:
    """Raise ValueError for what nothing can be computed with: NaN, infinity, and numbers out of range of any run."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            _check_numbers(value, key)
    elif isinstance(values, float) and not abs(values) <= LARGEST:
        raise ValueError(f"config key {key}: wants a finite number, to {LARGEST:g} in size, got {values}")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ValueError(f"config key {key}: wants a whole number of 64 bits, got {values}")


@functools.cache
def _structured(schema: type) -> DictConfig:
    """The schema as OmegaConf has it, to be merged into, which copies it: to make it takes as long again."""
    return OmegaConf.structured(schema)


def _literal(value: Any) -> Any:
    """The value in which OmegaConf finds nothing to resolve, and of which it makes just this text."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return "\\" + value if re.fullmatch(r"\\*\?\?\?", value) else value  # ??? alone: a value that is missing


def to_yaml(values: dict[str, Any]) -> str:
    """YAML that is read as these values, to the letter."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(values)))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by full key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def renamed(values: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The values with their keys and sections under today's names. names: {full old name: full new name}.

    Raises ValueError for a key that is given under both.
    """
    found: dict[str, Any] = {}
    for path, value in _paths(values):
        for old, new in names.items():
            if path[: old.count(".") + 1] == tuple(old.split(".")):
                path = (*new.split("."), *path[old.count(".") + 1 :])
        *sections, key = path
        holder: Any = found
        for section in sections:
            holder = holder.setdefault(section, {}) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or key in holder:
            raise ValueError(f"config key {'.'.join(path)} is given twice, once by an old name: give it once")
        holder[key] = value
    return found


def _paths(values: dict[str, Any], way: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(keys from the top, value) of every value; what holds none is a value itself."""
    return [
        leaf
        for key, value in values.items()
        for leaf in (_paths(value, (*way, key)) if isinstance(value, dict) and value else [((*way, key), value)])
    ]


def unknown_keys(schema: type, values: dict[str, Any]) -> list[str]:
    """Full names of keys that the schema does not have."""
    known = [name for name, _ in leaves(schema)]
    return [
        key
        for key in flat(values)
        if not any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in known)
    ]


def is_free(schema: type, key: str) -> bool:
    """Whether a key, by its full name, or a section that it is in, is marked as FREE."""
    section: Any = schema
    for part in key.split("."):
        items = {item.name: item for item in fields(section)} if is_dataclass(section) else {}
        if part not in items:
            return False
        if items[part].metadata == FREE:
            return True
        section = typing.get_type_hints(section)[part]
    return False


def leaves(schema: type, prefix: str = "") -> list[tuple[str, Any]]:
    """(full name, type) of every key, sections left out."""
    hints = typing.get_type_hints(schema)
    return [
        leaf
        for item in fields(typing.cast(Any, schema))
        for leaf in (
            leaves(hints[item.name], f"{prefix}{item.name}.")
            if is_dataclass(hints[item.name])
            else [(prefix + item.name, hints[item.name])]
        )
    ]


def _is_text(hint: Any) -> bool:
    return hint in (str, Any)


def _overrides(schema: type, overrides: list[str]) -> DictConfig:
    """What key.sub=value words ask for. Raises ValueError for a key that is given twice."""
    text_keys = {name for name, hint in leaves(schema) if _is_text(hint)}
    given: dict[str, list[str]] = {}
    found: Any = OmegaConf.create()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key.sub=value")
        if re.search(r"[\ud800-\udfff]", text):  # which config.yaml could not hold
            raise ValueError(f"override {override!r} is not UTF-8 text; give a path in other letters, such as a link's")
        part: Any = OmegaConf.create()
        key = re.sub(r"\[(\w+)\]", r".\1", key)
        if key in text_keys and not re.match(r"\s*\[\s*\{", text):  # of a list of several sources
            OmegaConf.update(part, key, _literal(_unquoted(text)))
        else:
            with _naming(f"override {override[:100]!r}"):
                part = OmegaConf.from_dotlist([override])
        for name in flat(typing.cast(dict, OmegaConf.to_container(part))):
            same = [other for other in given if f"{other}.".startswith(f"{name}.") or name.startswith(f"{other}.")]
            given.setdefault(same[0] if same else name, []).append(text)
        found = OmegaConf.merge(found, part)
    for name, texts in given.items():
        if len(texts) > 1:
            raise ValueError(_given_twice(name, texts))
    return found


def _unquoted(text: str) -> str:
    """Text less the quotes around all of it, which YAML asked for when it read text keys, too."""
    return text[1:-1] if re.fullmatch(r"""'[^']*'|"[^"]*\"""", text, re.DOTALL) else text


def _given_twice(key: str, texts: list[str]) -> str:
    shown = f"{texts[0]!r}{' ...' if len(texts) > 2 else ''} and {texts[-1]!r}"
    message = f"config key {key} is given {len(texts)} times, {shown}: give it once"
    start = os.path.commonprefix(texts)  # noqa: RUF071 - of characters, as the shell puts them together
    end = os.path.commonprefix([text[len(start) :][::-1] for text in texts])[::-1]  # noqa: RUF071
    parts = [text[len(start) : len(text) - len(end)] for text in texts]
    if len(set(texts)) < len(texts) or not (start or end):
        return message
    counted = all(part.isdecimal() for part in parts) and len(texts) == int(parts[-1]) - int(parts[0]) + 1
    braces = f"{parts[0]}..{parts[-1]}" if counted else ",".join(parts)
    return f"{message}; if the shell made these of braces, quote the braces: '{key}={start}{{{braces}}}{end}'"


def _check_keys(schema: type, values: Any, section: type, prefix: str = "") -> None:
    """Raise ValueError for a key that a section of the schema does not have, naming the nearest one."""
    if not isinstance(values, dict):
        raise ValueError(f"config key {prefix.rstrip('.')} is a section and takes keys, got {values!r}")
    hints = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in hints:
            keys = [name for name, _ in leaves(schema)]
            by_leaf = {full.rsplit(".", 1)[-1]: full for full in keys}
            sections = [] if prefix else list(hints)
            near = difflib.get_close_matches(f"{prefix}{key}", keys + sections, n=1, cutoff=0.6)
            near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(str(key), by_leaf, n=1, cutoff=0.6)]
            hint = f"; did you mean {near[0]}?" if near else f"; valid here: {', '.join(hints)}"
            raise ValueError(f"unknown config key {prefix}{key}{hint}")
        if is_dataclass(hints[key]):
            _check_keys(schema, value, typing.cast(type, hints[key]), f"{prefix}{key}.")


def _check_texts(section: type, values: dict[str, Any], path: Path | None, prefix: str = "") -> None:
    """Raise ValueError for a value of a text key that is no text: OmegaConf would make some text of it."""
    hints = typing.get_type_hints(section)
    for item in fields(typing.cast(Any, section)):
        key, hint = item.name, hints[item.name]
        if key in values and is_dataclass(hint):
            _check_texts(typing.cast(type, hint), values[key], path, f"{prefix}{key}.")
        elif key in values and _is_text(hint):
            fits = (str, list) if hint is Any else (str,)
            if type(values[key]) not in (*fits, *[int] * (item.metadata == NUMBERS_TOO)):
                raise ValueError(f"config key {prefix}{key}: wants text, {_written(path, prefix + key, values[key])}")


def _written(path: Path | None, key: str, value: Any) -> str:
    """What stands in a file for a value that is no text, and what to write."""
    if path is None or isinstance(value, dict | list):
        return f"got {value!r}"
    text, node = json.dumps(value), yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    for part in key.split("."):
        node = next((item for name, item in getattr(node, "value", []) if name.value == part), None)
    if isinstance(node, yaml.ScalarNode):  # else it is merged from elsewhere in the file
        text = node.value
    leaf = key.rpartition(".")[2]
    return f'and YAML reads {text or "nothing"} in {path} as {json.dumps(value)}; write it in quotes: {leaf}: "{text}"'


def _key_of_failure(schema: type, values: dict[str, Any]) -> str:
    """The key that OmegaConf does not take, by merging one at a time: it names none in some errors, or another one.

    "": none by itself.
    """
    known = [name for name, _ in leaves(schema)]
    for path, _ in _paths(values):
        key = next((name for name in known if f"{'.'.join(map(str, path))}.".startswith(f"{name}.")), "")
        section: Any = values
        for part in key.split(".") if key else ():
            section = section[part]
        alone: Any = section
        for part in reversed(key.split(".")):
            alone = {part: alone}
        try:
            OmegaConf.to_container(OmegaConf.merge(_structured(schema), alone), resolve=True)
        except (OmegaConfBaseException, TypeError):
            return key
    return ""


def _first_line(error: Exception) -> str:
    # OmegaConf 2.4.0 leaves the placeholders unfilled for a tuple's element.
    return str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "a value in it")
