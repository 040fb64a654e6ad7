"""A comparison, top to bottom: the plan, each run and its probes, what it shows. Read it first in this room."""

import time

from rich.console import Console

from ijepa_scale.compare.launching import train
from ijepa_scale.compare.pacing import Clock, say
from ijepa_scale.compare.probing import (
    PROBES,
    Pairs,
    Scores,
    asked_for,
    labelled_images,
    probe,
    probe_initial,
    read_probes,
)
from ijepa_scale.compare.results import curves_of, terminal_table, write_results
from ijepa_scale.compare.runs import Training, make_plan
from ijepa_scale.config import CompareConfig
from ijepa_scale.engine.signals import STOP_EXIT_CODE, StopRequest


def compare(config: CompareConfig, stop: StopRequest) -> int:
    """Train, probe, compare; the exit code: 0 done, 75 stopped on request. What is done already is not done again.

    Raises ValueError, before anything is trained, for what a user can mend, and RunError for a run that fails.
    """
    plan = make_plan(config)
    plan.out.mkdir(parents=True, exist_ok=True)
    say(f"opening {plan.recipes[0].config.data.source}; scenes are rendered first, once")
    pairs = labelled_images(config, plan.recipes[0].config)
    asked = asked_for(config, pairs)
    for training in plan.all_runs():
        read_probes(training.folder / PROBES, asked)  # which refuses those of other settings
    initial = {
        training.seed: probe_initial(training, config, pairs)
        for training in plan.runs("images")
        if training.recipe is plan.recipes[0]
    }
    say(f"the untrained encoder, seed {config.seeds[0]}: {in_words(initial[config.seeds[0]])}")
    clock = Clock(plan)
    for equal in config.equal:
        for training in plan.runs(equal):
            began = time.monotonic()
            if not training.finished:
                clock.begin(training)
                if not train(training, plan.ranks, stop, clock.show):
                    say(f"stopped by {stop.reason} in {training.name}; the same command goes on from there")
                    return STOP_EXIT_CODE
                clock.end(training, time.monotonic() - began)
            stop.doing = f"the probes of {training.name}"
            clock.probed(lambda training=training: probe_run(training, config, pairs))  # type: ignore[misc]
    curves = curves_of(plan, asked, initial)
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 200  # a log file has no width, and cells are not to be wrapped
    for title, rows in write_results(plan, curves, initial, list(pairs)):
        console.print(terminal_table(title, rows))
        console.print()
    say(f"results: {plan.out}/results.json, results.md, results.png")
    return 0


def probe_run(training: Training, config: CompareConfig, pairs: Pairs) -> bool:
    """Probe what is not probed yet of a run; whether there was any."""
    told: list[int] = []

    def tell(step: int, scores: Scores) -> None:
        told.append(step)
        say(f"{training.name}, step {step}/{training.steps}: {in_words(scores)}")

    probe(training, config, pairs, tell)
    return bool(told)


def in_words(scores: Scores) -> str:
    return ", ".join(f"{name} {score['value']:.1f}%" for name, score in scores.items())
