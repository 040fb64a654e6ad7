"""What engine/checkpoint.py uses of a DeepSpeed engine at ZeRO-1 or -2, without DeepSpeed: for tests of the files."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch

from ijepa_scale.engine import checkpoint
from ijepa_scale.engine.distributed import Ranks

# One group with an EMA and one without, as flats; on two ranks the cut goes through "b".
GROUPS = (
    {"context_encoder.a": (5, 3), "context_encoder.b": (40,), "context_encoder.c": (2, 2)},
    {"predictor.d": (11,)},
)
SHAPES = {name: torch.Size(shape) for group in GROUPS for name, shape in group.items()}
ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def value(kind: str, name: str, step: int) -> torch.Tensor:
    """What parameter `name` holds at a step: random fp32, with a NaN, an infinity and a negative zero."""
    seed = int.from_bytes(hashlib.sha256(f"{kind}/{name}/{step}".encode()).digest()[:6], "little")
    values = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))
    values.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return values


class StandIn:
    """The state of one rank at a step."""

    def __init__(self, rank: int, world_size: int, step: int):
        self.masters: list[torch.Tensor] = []
        fragments: list[tuple[str, int, int, int, int]] = []
        shards: list[torch.Tensor | None] = []
        state = {}
        for at, group in enumerate(GROUPS):
            length = sum(torch.Size(shape).numel() for shape in group.values())
            share = -(-length // (2 * world_size)) * 2
            low = rank * share
            offset = 0
            for name in group:
                start, end = max(low, offset), min(low + share, offset + SHAPES[name].numel())
                if start < end:
                    fragments.append((name, start - offset, end - start, at, start - low))
                offset += SHAPES[name].numel()

            def flat_of(kind: str, group: dict = group, low: int = low, share: int = share) -> torch.Tensor:
                whole = torch.cat([value(kind, name, step).flatten() for name in group] + [torch.zeros(2 * share)])
                return whole[low : low + share].clone()

            flat = flat_of("master")
            state[flat] = {
                "step": torch.tensor(float(step)),
                "exp_avg": flat_of("exp_avg"),
                "exp_avg_sq": flat_of("exp_avg_sq"),
            }
            shards.append(flat_of("ema") if "context_encoder.a" in group else None)
            self.masters.append(flat)
        self.refreshed = 0
        self.ema = SimpleNamespace(shards=shards, refresh_target=self._refresh)
        self.optimizer = SimpleNamespace(
            buckets=[SimpleNamespace(master=flat) for flat in self.masters],
            fragments=lambda: fragments,
            optimizer=SimpleNamespace(state=state),
            update_lp_params=self._refresh,
        )

    def _refresh(self) -> None:
        self.refreshed += 1

    def holds(self, other: "StandIn") -> bool:
        """The same state, bit for bit."""
        return all(
            torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(self.all(), other.all(), strict=True)
        )

    def all(self) -> list[torch.Tensor]:
        state = [value for flat in self.masters for _, value in sorted(self.optimizer.optimizer.state[flat].items())]
        return [*self.masters, *state, *(shard for shard in self.ema.shards if shard is not None)]


def save(folder: Path, step: int, ranks: Ranks = ALONE, *, aside: bool = False, **meta: object) -> Path:
    """aside: the state is another one before the checkpoint is finished."""
    engine = StandIn(ranks.rank, ranks.world_size, step)
    if not aside:
        return checkpoint.save(folder, engine, engine.ema, ranks, step=step, meta=meta)
    saving = checkpoint.Saving(folder, engine, engine.ema, ranks, step=step, meta=meta, aside=True)
    for values in engine.all():
        values.fill_(7.0)
    return saving.finish()


def assert_loads(found: checkpoint.Checkpoint, step: int) -> None:
    """found holds what StandIn had at step: every kind of every parameter, bit for bit, and into any engine."""
    assert found.step == step
    for kind in checkpoint.KINDS:
        names = {name: shape for name, shape in SHAPES.items() if kind != "ema" or name.startswith("context_encoder.")}
        for name, values in checkpoint.read_weights(found, names, kind).items():
            assert torch.equal(values.view(torch.int32), value(kind, name, step).view(torch.int32)), (kind, name)
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            engine = StandIn(rank, world_size, step=0)
            checkpoint.restore(found, engine, engine.ema)
            assert engine.holds(StandIn(rank, world_size, step))
            assert engine.refreshed == 2
