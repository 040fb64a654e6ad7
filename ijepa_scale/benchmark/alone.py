"""The training step alone, through train.train_step() and the feed: every step listed, then the same from a trace."""

import gc
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ijepa_kernels.dispatch import chosen
from ijepa_scale import build
from ijepa_scale.benchmark.in_memory import DrawnOnDevice, attention_of, batches_of, one_process, run_in_memory
from ijepa_scale.benchmark.profiling import profile_steps
from ijepa_scale.benchmark.timing import Say, allocator_retries, machine, moment, spread, until_it_fits
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.collate import Batch
from ijepa_scale.engine.device import memory_bytes
from ijepa_scale.engine.feed import Feed, collecting_by_hand
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.plan.dry_run import parameter_counts
from ijepa_scale.plan.step_model import ATTENTION, MATRIX, Rates, Work, by_category, model_step
from ijepa_scale.run.late_records import LateRecords
from ijepa_scale.run.setup import Run
from ijepa_scale.train import RELEASE_STEPS, train_step

STEPS = 50  # each with masks of its own
AGAIN = 10  # the last of them once more
TRACED = 3  # after these, one of them to warm the profiler up
WARM_UP = 5  # steps that compile and plan, as they may
SPIKE = 1.5  # medians
NEW_LAYOUT = 1.1  # how much longer a layout of masks may take when it comes for the first time


class Steps:
    """The steps of a run, one at a time, as the training loop takes them."""

    def __init__(self, run: Run, batches: Sequence[Batch]) -> None:
        """batches: one a step; the horizon of the run is as many steps."""
        self.run, self.batches = run, batches
        self.records: list[dict[str, Any]] = []
        self.feed = Feed(iter(batches), run.ranks.device)
        self.late = LateRecords(run, self.records.append, None, lambda text: None)
        self.done = 0
        self.last = moment(run.ranks.device)

    def take(self) -> None:
        """The next one. last is then when the device will have done it; no clock is read, which would wait for it."""
        outcome = train_step(self.run, self.done, self.feed, stop=False, meanwhile=self.late.settle)
        self.late.add(outcome)
        self.done += 1
        if self.done % RELEASE_STEPS == 0:
            gc.collect()
            self.run.ranks.release_memory()
        self.last = moment(self.run.ranks.device)


def alone(
    config: PretrainConfig, folder: Path, *, rates: Rates | None, say: Say, steps: int = STEPS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("alone", every step and what is wrong with it), then ("trace", the same by category), ready for JSON.

    folder: for the trace. rates: of this device as measured; None: not known. Where a GPU's memory does not hold a
    step, the batch is halved until it does. Raises ValueError where training would be refused.
    """
    with one_process() as ranks, tempfile.TemporaryDirectory() as runs:
        objective = DrawnOnDevice.of(build.build_ijepa(config), ranks.device)
        asked = config.optimization.micro_batch_size or config.optimization.global_batch_size

        def attempt(batch: int) -> tuple[Steps, dict[str, Any]]:
            total = steps + AGAIN + TRACED
            say(f"a run of {batch} images a step")
            run = run_in_memory(config, objective, ranks, batch=batch, steps=total, folder=Path(runs, str(batch)))
            new = batches_of(run, steps)
            say(f"{steps} steps, then {AGAIN} of their layouts again")
            taken = Steps(run, [*new, *new[-AGAIN:], *new[-TRACED:]])
            with collecting_by_hand():
                return taken, {**listed(taken, steps), "batch": batch, "batch_asked": asked}

        taken, found = until_it_fits(attempt, asked, ranks.device, say)
        model = modelled(config, taken.batches[:steps], found["batch"], rates)
        facts = {"machine": machine(ranks.device), "compile": config.engine.compile, **facts_of(taken.run)}
        found = {**facts, **found, **rates_of(found, rates), "estimate": estimate(model, rates)}
        say(in_words(found))
        yield "alone", found
        say("tracing")
        with collecting_by_hand():
            traced = profile_steps(lambda _: taken.take(), folder, device=ranks.device, steps=TRACED - 1)
        yield "trace", {**facts, "batch": found["batch"], **traced, "achieved": achieved(traced["categories"], model)}


def listed(taken: Steps, steps: int) -> dict[str, Any]:
    """Take all steps but those to be traced."""
    from torch._dynamo.utils import counters

    device = taken.run.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ends, graphs, retries = [taken.last], [], allocator_retries(device)
    for _ in range(steps + AGAIN):
        taken.take()
        ends.append(taken.last)
        graphs.append(counters["stats"]["unique_graphs"])
    taken.late.settle()
    seconds = [end - start for start, end in pairwise(ends)]
    found = {
        "seconds": seconds[:steps],
        "seconds_again": seconds[steps:],
        "graphs_compiled": graphs,
        "peak_memory_bytes": memory_bytes(),
        "allocator_retries": allocator_retries(device) - retries,
        "data_wait_seconds": taken.feed.waits.seconds,
        "losses": [record["loss"] for record in taken.records],
        "model_flops": [record["model_flops"] for record in taken.records],
        "context_tokens": [record["context_tokens"] for record in taken.records],
        "skipped": [record["step"] + 1 for record in taken.records if not record["applied"]],
    }
    return {**found, "faults": faults(found, timed=device.type == "cuda")}


def faults(found: dict[str, Any], *, timed: bool) -> list[str]:
    """What a step must not do after the warm-up, in words, with its number from 1.

    timed: whether times say something: on a CPU whatever else runs moves them.
    """
    seconds, again, graphs = found["seconds"], found["seconds_again"], found["graphs_compiled"]
    median = statistics.median(seconds[WARM_UP:])
    said = [f"step {step} was skipped: loss or gradients not finite" for step in found["skipped"]]
    for step, (before, now) in enumerate(pairwise(graphs), 2):
        if step > WARM_UP and now > before:
            said.append(f"step {step} compiled {now - before} graphs anew")
    if not timed:
        return said
    for step, one in enumerate([*seconds, *again], 1):
        if step > WARM_UP and one > SPIKE * median:
            said.append(
                f"step {step} took {1e3 * one:.0f} ms, {one / median:.1f} times the median of {1e3 * median:.0f}"
            )
    first, second = statistics.median(seconds[-len(again) :]), statistics.median(again)
    if first > NEW_LAYOUT * second:
        said.append(
            f"masks that come for the first time take {1e3 * first:.0f} ms, and {1e3 * second:.0f} when they come "
            "again: something is planned or compiled for every shape"
        )
    return said


def rates_of(found: dict[str, Any], rates: Rates | None) -> dict[str, Any]:
    """images/s and FLOP/s after the warm-up. share_of_sustained: of the matrix rate that this device sustains."""
    kept = list(zip(found["seconds"], found["model_flops"], strict=False))[WARM_UP:]
    flops = spread([flops / seconds for seconds, flops in kept])
    return {
        "step_seconds": spread([seconds for seconds, _ in kept]),
        "images_per_second": spread([found["batch"] / seconds for seconds, _ in kept]),
        "flop_per_second": flops,
        "share_of_sustained": flops["median"] / rates.matrix if rates else None,
    }


def in_words(found: dict[str, Any]) -> str:
    milliseconds, share = 1e3 * found["step_seconds"]["median"], found["share_of_sustained"]
    expected = found["estimate"].get("milliseconds")
    return (
        f"{found['images_per_second']['median']:,.1f} images/s, {milliseconds:,.1f} ms for {found['batch']} images"
        + (f" ({expected:,.1f} by arithmetic, not measured)" if expected else "")
        + (f", {100 * share:.1f}% of the sustained matrix rate" if share else "")
        + f", {found['peak_memory_bytes'] / 2**30:.1f} GiB at most"
    )


def facts_of(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "model": f"{config.model.name}/{config.model.patch_size}",
        "image_size": config.data.image_size,
        "precision": run.facts["precision"],
        "zero_stage": config.engine.zero_stage,
        "attention": attention_of(run),
        "operations": chosen(run.ranks.device),
        "activation_checkpointing": config.engine.activation_checkpointing,
    }


def modelled(config: PretrainConfig, batches: Sequence[Batch], batch: int, rates: Rates | None) -> list[Work]:
    """The model of the mean step of these batches, at the device's own rates; at 1 FLOP/s and 1 B/s without them."""
    objective = build.build_ijepa(config)
    with torch.device("meta"):
        trained, averaged = parameter_counts(objective, objective.build())
    return model_step(
        objective,
        Counts.mean([Counts.of(one.masks) for one in batches]).times(batch),
        trained=sum(trained.values()),
        averaged=averaged,
        rates=rates or Rates(matrix=1.0, copy=1.0),
        compiled=config.engine.compile,
    )


def estimate(model: list[Work], rates: Rates | None) -> dict[str, Any]:
    """What plan/step_model.py expects at the rates that this device sustains."""
    if rates is None:
        return {"missing": "the device's rates were not measured"}
    return {"milliseconds": 1e3 * sum(one.seconds for one in model), "categories": by_category(model)}


def achieved(categories: list[dict[str, Any]], model: list[Work]) -> dict[str, dict[str, float]]:
    """By category: TFLOP/s of products and attention, GB/s of the others, by the model's FLOPs and bytes."""
    counted, found = by_category(model), {}
    for row in categories:
        amounts = counted.get(row["name"], {})
        if row["name"] in (MATRIX, ATTENTION) and amounts.get("flops"):
            found[row["name"]] = {"tflop_per_second": 1e-9 * amounts["flops"] / row["milliseconds"]}
        elif amounts.get("bytes"):
            found[row["name"]] = {"gigabytes_per_second": 1e-6 * amounts["bytes"] / row["milliseconds"]}
    return found
