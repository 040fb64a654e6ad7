"""The runs of a comparison: which there are, how long each is, what it has taken so far."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ijepa_scale.compare.recipes import Recipe, open_recipes
from ijepa_scale.config import CompareConfig, PretrainConfig, changed_keys, load_config, to_dict
from ijepa_scale.engine.checkpoint import candidates, folder_name, read_manifest
from ijepa_scale.run.folder import RunFolder
from ijepa_scale.run.records import read_records

SPENT = ("images", "seconds", "model_flops", "hardware_flops")
ALIKE = 0.02  # a run whose length would differ from another's by a smaller share is not trained again
CPU_RANKS = 2  # as make pretrain


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run. equal: what its length is equal in, of CompareConfig.equal. probes: checkpoints of it to be probed."""

    recipe: Recipe
    seed: int
    equal: str
    steps: int
    probes: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def every(self) -> int:
        """Steps from one probed checkpoint to the next."""
        return -(-self.steps // self.probes)

    @property
    def probed(self) -> list[int]:
        """The steps whose checkpoints are probed."""
        return [*range(self.every, self.steps, self.every), self.steps]

    @property
    def words(self) -> list[str]:
        """Overrides of the recipe's config, as pretrain takes them."""
        return [
            *self.recipe.words,
            f"seed={self.seed}",
            f"run_dir={self.folder}",
            f"optimization.max_steps={self.steps}",
            "optimization.stop_at_step=0",
            f"checkpoint.every_steps={self.every}",
            f"checkpoint.keep_every={self.every}",
            "checkpoint.keep_last=1",
            "report.train_images=0",
        ]

    @property
    def config(self) -> PretrainConfig:
        return load_config(self.recipe.file, self.words)

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints, oldest first."""
        return candidates(RunFolder(self.folder).checkpoints)[::-1]

    @property
    def finished(self) -> bool:
        return any(path.name == folder_name(self.steps) for path in self.checkpoints)

    def check_goes_on(self) -> None:
        """ValueError where what is in its folder was trained with other settings."""
        if there := self.checkpoints:
            changed = changed_keys(read_manifest(there[-1])["config"], to_dict(self.config))
            if changed:
                listed = ", ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
                raise ValueError(
                    f"{self.folder} was trained with other settings: {listed}; restore them, or give another out"
                )


def spent(training: Training) -> np.ndarray:
    """(probed steps + 1, len(SPENT)) float64 of a finished run: totals at its start and at each of its probed steps.

    Seconds are those of steps alone, with their waiting for data: no set-up, checkpoint, health check or probe.
    """
    totals = _totals(training.folder / "metrics.jsonl", training.recipe.batch)
    assert len(totals) == training.steps + 1, f"{training.folder} has the records of {len(totals) - 1} steps"
    return totals[[0, *training.probed]]


@functools.cache
def _totals(path: Path, batch: int) -> np.ndarray:
    """(steps + 1, len(SPENT)): what has been spent before each step of a finished run, and in all."""
    each = [
        (batch, record["step_seconds"], record["model_flops"], record["hardware_flops"])
        for record in read_records(path)
        if record["kind"] == "step"
    ]
    return np.concatenate([np.zeros((1, len(SPENT))), np.cumsum(np.array(each, dtype=np.float64), axis=0)])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a comparison. recipes: the first is the one that others are given the seconds and FLOPs of."""

    config: CompareConfig
    recipes: list[Recipe]
    ranks: int
    out: Path

    def training(self, recipe: Recipe, seed: int, equal: str, steps: int) -> Training:
        folder = self.out / f"{recipe.name}-seed{seed}{'' if equal == 'images' else f'-equal-{equal}'}"
        return Training(recipe=recipe, seed=seed, equal=equal, steps=steps, probes=self.config.probes, folder=folder)

    def runs(self, equal: str, guess: dict[str, float] | None = None) -> list[Training]:
        """The runs that are equal in something, seed by seed: what a machine does over hours befalls all recipes.

        Those equal in seconds or FLOPs have lengths once the first ones are trained. Before, guess: seconds an image of
        each recipe; what it lacks is left out.
        """
        if equal == "images":
            lengths = {recipe.name: recipe.steps for recipe in self.recipes}
        else:
            lengths = {recipe.name: self._steps(recipe, equal, guess or {}) for recipe in self.recipes[1:]}
        chosen = [(recipe, lengths.get(recipe.name) or 0) for recipe in self.recipes]
        return [
            self.training(recipe, seed, equal, steps) for seed in self.config.seeds for recipe, steps in chosen if steps
        ]

    def _steps(self, recipe: Recipe, equal: str, guess: dict[str, float]) -> int:
        """How long a run is that takes the seconds or FLOPs of the first recipe; 0: none is needed, or not known."""
        for seed in self.config.seeds:  # one that was begun decides, also where seeds are added later
            if there := self.training(recipe, seed, equal, recipe.steps).checkpoints:
                return read_manifest(there[-1])["config"]["optimization"]["max_steps"]
        first = self.recipes[0]
        ours, theirs = (
            [self.training(one, seed, "images", one.steps) for seed in self.config.seeds] for one in (recipe, first)
        )
        if all(training.finished for training in (*ours, *theirs)):
            column = SPENT.index("seconds" if equal == "seconds" else "model_flops")
            mine, target = (sum(spent(training)[-1, column] for training in of) for of in (ours, theirs))
        elif equal == "flops":
            mine, target = recipe.flops, first.flops
        elif {recipe.name, first.name} <= guess.keys():
            mine, target = guess[recipe.name], guess[first.name]
        else:
            return 0
        steps = max(1, round(recipe.steps * target / mine))
        return 0 if abs(steps - recipe.steps) <= ALIKE * recipe.steps else steps

    def measured(self) -> dict[str, float]:
        """Seconds an image, by recipe, of those that have finished runs."""
        known = {}
        for recipe in self.recipes:
            runs = [self.training(recipe, seed, "images", recipe.steps) for seed in self.config.seeds]
            if totals := [spent(training)[-1] for training in runs if training.finished]:
                known[recipe.name] = sum(total[1] for total in totals) / sum(total[0] for total in totals)
        return known

    def by_flops(self, known: dict[str, float]) -> dict[str, float]:
        """Seconds an image of all recipes: those that are known, and others in proportion to their FLOPs."""
        if not known:
            return {}
        each = sum(known[recipe.name] / recipe.flops for recipe in self.recipes if recipe.name in known) / len(known)
        return {recipe.name: known.get(recipe.name, each * recipe.flops) for recipe in self.recipes}

    def all_runs(self, guess: dict[str, float] | None = None) -> list[Training]:
        return [training for equal in self.config.equal for training in self.runs(equal, guess)]


def make_plan(config: CompareConfig) -> Plan:
    """ValueError for whatever a user can get wrong, before anything is trained."""
    gpus = torch.cuda.device_count()
    ranks = config.ranks or gpus or CPU_RANKS
    if gpus and ranks > gpus:
        raise ValueError(f"ranks is {ranks} and this machine has {gpus} GPUs; give ranks={gpus}, or 0")
    plan = Plan(config=config, recipes=open_recipes(config, ranks=ranks), ranks=ranks, out=Path(config.out))
    for training in plan.all_runs():
        training.check_goes_on()
    return plan
