"""What a comparison of recipes is made of: configs/compare_*.yaml -> CompareConfig."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ijepa_scale.config.loading import find_config
from ijepa_scale.config.ranges import NO_LIMIT, PROCESSES, check_ranges
from ijepa_scale.config.reading import read

PROBES = 1000  # checkpoints of a run, which are kept
EQUAL = ("images", "seconds", "flops")
# What the comparison sets for each of its runs.
OWN_KEYS = ("seed", "run_dir", "optimization.max_steps", "optimization.stop_at_step", "checkpoint", "report")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    # A name -> {config: a pre-training config, overrides: [key.sub=value, ...]}; null: left out. The seconds and FLOPs
    # of the first are those that the others are given
    recipes: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()  # key.sub=value words for every recipe, under its own
    seeds: tuple[int, ...] = (0, 1, 2)  # each recipe is trained with each of them
    images: int = 0  # that every recipe is trained on, counting repeats
    # What runs are made equal in: images, and besides seconds | flops, in runs of their own, with schedules as long
    equal: tuple[str, ...] = ("images", "seconds")
    probes: int = 4  # checkpoints of each run that are probed, evenly spaced, the last at its end
    labels: tuple[str, ...] = ()  # columns of classes that are probed; none given: all that the source has
    train_images: int = 4000  # labelled images that probes are fitted on; 0: all
    test_images: int = 2000
    labels_per_class: int = 12  # of the probe with few labels
    ranks: int = 0  # processes of a run; 0: one for each GPU, or two on the CPU
    out: str = ""  # the folder of all runs and results; "": runs/<name of the config file>

    def __post_init__(self) -> None:
        for key in ("seeds", "equal", "labels"):
            values = getattr(self, key)
            _require(len(set(values)) == len(values), f"{key} names something twice, got {list(values)}")
        _require(bool(self.seeds) and min(self.seeds) >= 0, f"seeds must be 0 or more, got {list(self.seeds)}")
        _require(self.images >= 1, f"images must be 1 or more, got {self.images}: how many each recipe is trained on")
        unknown = set(self.equal) - set(EQUAL)
        _require(
            not unknown and self.equal[:1] == ("images",),
            f"equal must be images, and after it any of seconds and flops, got {list(self.equal)}",
        )
        check_ranges(
            "",
            self,
            probes=(1, PROBES),
            labels_per_class=(1, NO_LIMIT),
            train_images=(0, NO_LIMIT),
            test_images=(0, NO_LIMIT),
            ranks=(0, PROCESSES),
        )
        _require(
            len(self.named_recipes) >= 2, f"a comparison needs two recipes or more, got {list(self.named_recipes)}"
        )

    @property
    def named_recipes(self) -> dict[str, tuple[str, list[str]]]:
        """name -> (config, overrides: the comparison's, and those of the recipe over them)."""
        found = {}
        for name, given in self.recipes.items():
            if given is None:
                continue
            fits = isinstance(given, dict) and {"config"} <= given.keys() <= {"config", "overrides"}
            words = given.get("overrides", []) if fits else []
            fits = fits and isinstance(given["config"], str) and isinstance(words, list)
            _require(
                fits and all(isinstance(word, str) for word in words),
                f"recipes.{name} wants {{config: FILE, overrides: [key.sub=value, ...]}}, got {given!r}",
            )
            _require(
                bool(re.fullmatch(r"\w+(-\w+)*", name)),
                f"recipes.{name}: a name is of letters, digits, - and _: {name!r}",
            )
            found[name] = given["config"], _over(self.overrides, words, name)
        return found


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> CompareConfig:
    """Read a YAML file, then key=value overrides. path: a file, or the name of one of the package's own.

    Raises ValueError, in one line that names the key, for all that a user can get wrong.
    """
    path = find_config(path)
    config = read(CompareConfig, path, overrides or [])
    return replace(config, out=os.path.expanduser(config.out or f"runs/{path.stem}"))


def _over(common: tuple[str, ...], own: list[str], name: str) -> list[str]:
    """Words of both, the recipe's own in the place of common ones of the same key."""
    for word in (*common, *own):
        key = word.partition("=")[0]
        if any(f"{key}.".startswith(f"{other}.") for other in OWN_KEYS):
            raise ValueError(f"recipes.{name}: {word} is set by the comparison itself; leave it out")
    keys = {word.partition("=")[0] for word in own}
    return [word for word in common if word.partition("=")[0] not in keys] + own


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
