"""Runs inside ranks: saving and restoring, and dying or failing in the middle of it."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ijepa_scale.engine import checkpoint, distributed, zero
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.optim import set_schedules
from tests.engine import standin, tiny


def join() -> Ranks:
    """The ranks without DeepSpeed."""
    dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), dist.group.WORLD)


def die_at(point: str, count: int) -> Any:
    """Kills this process as by kill -9 at the count-th call of `point`, or half-way through it."""
    calls = 0
    owner, name = {
        "fsync": (checkpoint.os, "fsync"),
        "rename": (checkpoint.os, "rename"),
        "replace": (checkpoint.os, "replace"),
        "save_file": (checkpoint, "save_file"),
        "half a file": (checkpoint, "save_file"),
        "half a deletion": (checkpoint.shutil, "rmtree"),
    }[point]
    original = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < count:
            return original(*arguments, **options)
        if point == "half a file":
            original(*arguments)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if point == "half a deletion":
            next(Path(arguments[0]).iterdir()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    return mock.patch.object(owner, name, counted)


def save_and_die(folder: str, step: int, victim: int, point: str, count: int, aside: bool = False) -> None:
    """Save and prune on all ranks; the victim is killed on the way."""
    ranks = join()
    if ranks.rank == victim:
        die_at(point, count).start()
    standin.save(Path(folder), step, ranks, aside=aside)
    checkpoint.prune(Path(folder), ranks, keep_last=1, keep_every=0, newest=step)


def agree(folders: dict[str, str], result: str) -> None:
    """newest_good() on every rank for each folder, by name: what each rank found, or the error it raised."""
    ranks = join()
    facts = {}
    for name, folder in folders.items():
        try:
            found, skipped = checkpoint.newest_good(Path(folder), ranks)
            answer = {"step": found.step if found else None, "skipped": skipped}
        except ValueError as error:
            answer = {"error": str(error)}
        facts[name] = ranks.gather(answer)
    if ranks.first:
        Path(result).write_text(json.dumps(facts))


def fail_to_save(folder: str, victim: int, way: str, result: str, aside: bool = False) -> None:
    """Save step 1; fail at step 2 since the victim cannot write; save step 3. What each rank was told at step 2."""
    ranks = join()
    path = Path(folder)
    standin.save(path, 1, ranks)
    error = ""
    with cannot_write(way) if ranks.rank == victim else mock.patch.dict({}):
        try:
            standin.save(path, 2, ranks, aside=aside)
        except OSError as caught:
            error = str(caught)
    facts: dict[str, Any] = {"errors": ranks.gather(error), "left": sorted(p.name for p in path.iterdir())}
    found, skipped = checkpoint.newest_good(path, ranks)
    facts |= {"found": ranks.gather(found.step if found else None), "skipped": skipped}
    standin.save(path, 3, ranks)
    if ranks.first:
        Path(result).write_text(json.dumps(facts))


class _FileSizeLimit:
    """The kernel refuses to let a file grow past a few bytes, as a full disk does."""

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def cannot_write(way: str) -> Any:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return {
        "file size limit": _FileSizeLimit,
        "full at fsync": lambda: mock.patch.object(checkpoint.os, "fsync", full),
        "full at the manifest": lambda: mock.patch.object(checkpoint, "write_whole", full),
        "too little free": lambda: mock.patch.object(
            checkpoint.shutil, "disk_usage", lambda folder: mock.Mock(free=1000)
        ),
        "reads back wrong": lambda: mock.patch.object(checkpoint, "_same_bits", lambda a, b: False),
    }[way]()


def name_of(stage: int, precision: str, world_size: int) -> str:
    return f"zero{stage}-{precision}-{world_size}ranks"


def reshard(folder: str, engines: list[tuple[int, str]], sources: list[str], result: str, muon: bool = False) -> None:
    """Save the state of every engine after a few steps, unless an earlier launch has; restore all sources into each.

    folder: gets a folder of checkpoints an engine, and its state as it was. sources: names of such folders.
    """
    ranks = distributed.start()
    root = Path(folder)
    kept = []
    for number, (stage, precision) in enumerate(engines):
        name = name_of(stage, precision, ranks.world_size)
        engine, ema = tiny.start_engine(ranks, zero_stage=stage, precision=precision, muon=muon)
        kept.append((name, engine, ema))
        if not ranks.from_first((root / name).exists()):
            for step in range(3):
                set_schedules(engine.optimizer.optimizer.param_groups, lr=1e-3, weight_decay=0.1, ema_momentum=0.9)
                ((images, masks),) = tiny.micro_batches(100 * number + 10 * ranks.world_size + step, ranks, 1)
                engine.backward(engine(images, masks)["loss"])
                engine.step()
                ema.update()
            checkpoint.save(root / name, engine, ema, ranks, step=3, meta={})
            state = whole_state(engine, ema, ranks)
            if ranks.first:
                torch.save(state, root / name / "state.pt")
    ranks.barrier()
    facts: dict[str, dict[str, Any]] = {}
    for source in sources:
        found, skipped = checkpoint.newest_good(root / source, ranks)
        assert found and not skipped
        expected = torch.load(root / source / "state.pt")
        for name, engine, ema in kept:
            checkpoint.restore(found, engine, ema)
            facts[f"{source} -> {name}"] = restored_facts(engine, ema, ranks, expected)
    if ranks.first:
        Path(result).write_text(json.dumps(facts))
    ranks.close()


def whole_state(engine: Any, ema: Any, ranks: Ranks) -> dict[str, Any]:
    """Masters, moments, EMA and AdamW's step, whole."""
    flats: dict[str, Callable[[], list]] = {
        "master": lambda: zero.masters(engine.optimizer),
        "exp_avg": lambda: tiny.moments(engine, "exp_avg"),
        "exp_avg_sq": lambda: tiny.moments(engine, "exp_avg_sq"),
        "ema": lambda: ema.shards,
    }
    steps = [engine.optimizer.optimizer.state[flat]["step"].item() for flat in zero.masters(engine.optimizer)]
    return {kind: tiny.gathered(engine, ranks, make()) for kind, make in flats.items()} | {"steps": sorted(set(steps))}


def restored_facts(engine: Any, ema: Any, ranks: Ranks, expected: dict[str, Any]) -> dict[str, Any]:
    """Which parts of the state are as they were; and that the weights of both encoders follow them."""
    state = whole_state(engine, ema, ranks)
    dtype = engine.module.target_encoder.dtype
    used = tiny.weights_of(engine, "")
    targets = {name: used.pop(name) for name in list(used) if name.startswith("target_encoder.")}
    return {
        "bits": [kind for kind in checkpoint.KINDS if tiny.bits_equal(state[kind], expected[kind])],
        "steps": state["steps"] == expected["steps"] == [3.0],
        "weights": tiny.bits_equal(
            used,
            {name: values.to(dtype) for name, values in expected["master"].items()},
        ),
        "target": tiny.bits_equal(
            {name.replace("target_encoder.", "context_encoder."): values for name, values in targets.items()},
            {name: values.to(dtype) for name, values in expected["ema"].items()},
        ),
    }
