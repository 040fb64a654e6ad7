"""How large a number of a section may be: what is above is a slip, and would fill the memory or never end."""

from typing import Any

NO_LIMIT = float("inf")  # of its own: reading.py refuses what no number of a run can be
PIXELS = 2**14  # a side
WIDTH, MLP_WIDTH, DEPTH = 2**16, 2**18, 1000
BATCH = 2**24  # images
PROCESSES = 1000
PATCHES = 2**16  # of an image
BLOCKS = 1000  # of an image, and masks of one
LEARNING_RATE = 1000.0
SECONDS = 10**9  # which clocks of systems still take
EPOCHS, STEPS = 10**9, 10**12


def check_ranges(name: str, section: Any, /, **ranges: tuple[float, float]) -> None:
    """ValueError for a number of a section that is below the first or above the second of its range, or NaN.

    name: the section's; "": the keys stand at the top.
    """
    for key, (least, most) in ranges.items():
        value = getattr(section, key)
        values = value if isinstance(value, tuple) else (value,)
        if all(least <= one <= most for one in values):
            continue
        shown = list(value) if isinstance(value, tuple) else value
        over = any(one > most for one in values)
        raise ValueError(
            f"{name and name + '.'}{key} must be {least:g} or more{f' and {most:,} or less' * over}, got {shown}"
        )


def check_choice(name: str, section: Any, /, **choices: tuple[str, ...]) -> None:
    """ValueError for a text of a section that is none of those it may be."""
    for key, words in choices.items():
        value = getattr(section, key)
        if value not in words:
            listed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
            raise ValueError(f"{name}.{key} must be {listed}, got {value!r}")
