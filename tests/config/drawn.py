"""Configs of whatever values, for any dataclass of sections: of each key's type, at its edges, and of other types."""

import math
import typing
from typing import Any

import yaml
from hypothesis import strategies as st

from ijepa_scale.config.reading import leaves

WHOLE = [-(2**70), -(2**63), -1, 0, 1, 2, 3, 5, 7, 16, 30, 64, 1000, 10**6, 2**31, 2**63 - 1, 2**63, 2**64, 10**30]
BROKEN = [math.nan, math.inf, -math.inf, -0.0, -1.0, 5e-324, 1e-320, 1e-3, 0.2, 0.5, 0.99, 1.5, 4.0, 1e30, 1e300]
TEXTS = ["", " ", "x", "é" * 3, "a\nb", "a: b", "${seed}", "${nothing}", "${", "???", "null", "1e3", "9" * 5000, "\x07"]
WORDS = ["all", "batch_min", "3", "every_2", "every_0", f"every_{'9' * 20}", "none", "full", "[1, 2]", "[2, 1]", "l2"]
WORDS += ["adamw", "muon", "fp32", "bf16", "sdpa", "fa3", "vit_tiny", "vit_giant", "offline", "data2vec", "mae", "flow"]
OTHER = st.sampled_from([None, True, [], {}, [1], [[1]], {"a": 1}, {"a": {"b": [None]}}, "x", "nan"])

whole, broken = st.sampled_from(WHOLE) | st.integers(-3, 70), st.sampled_from(BROKEN) | st.floats(0, 2)
numbers = whole | broken


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values for a key of this type, most of them of the type."""
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.one_of(whole, whole, whole, broken, OTHER)
    if hint is float:
        return st.one_of(numbers, numbers, numbers, OTHER)
    if hint is str:
        return st.one_of(st.sampled_from(WORDS), st.sampled_from(TEXTS), numbers, OTHER)
    if typing.get_origin(hint) is tuple:
        items = {str: st.sampled_from(WORDS + TEXTS)}.get(typing.get_args(hint)[0], numbers)
        pairs = st.lists(items, min_size=2, max_size=2)
        return st.one_of(
            pairs, pairs.map(lambda pair: sorted(pair, key=str)), st.lists(items, max_size=4), numbers, OTHER
        )
    return st.one_of(st.sampled_from(WORDS + TEXTS), numbers, OTHER, st.lists(numbers, max_size=3))


def some_values(schema: type, *, less: tuple[str, ...] = (), most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """One to `most` keys, by their full names, with their values. less: keys or sections that are left alone."""
    hints = {key: hint for key, hint in leaves(schema) if not f"{key}.".startswith(tuple(f"{one}." for one in less))}
    one = st.sampled_from(sorted(hints)).flatmap(lambda key: st.tuples(st.just(key), of_type(hints[key])))
    return st.lists(one, min_size=1, max_size=most).map(dict)


def written(base: str, values: dict[str, Any]) -> str:
    """YAML of a config with these values in it."""
    config = yaml.safe_load(base) or {}
    for key, value in values.items():
        section: Any = config
        *sections, leaf = key.split(".")
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return yaml.safe_dump(config, allow_unicode=True)


def names_one(message: str, values: dict[str, Any]) -> bool:
    """Whether a message is one line that says which key is meant, or whose value (of a path, it may be that alone)."""
    named = any(key in message for key in values) or any(
        isinstance(value, str) and value.strip() and value in message for value in values.values()
    )
    return named and "\n" not in message and len(message) < 20_000
