"""Averaged networks under ZeRO, such as a target encoder: an fp32 EMA sharded exactly like the fp32 master weights."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ijepa_kernels.ema import ema_update
from ijepa_scale.engine.zero import flat_group, flat_parameters, is_stage3, masters


class ShardedEMA:
    """Each rank averages only its own part of the master weights and writes its part of the averaged network's weights.

    ZeRO-1 and -2: the target's weights are views of one flat buffer a parameter group, all-gathered after each update.
    ZeRO-3: the target's own shards are views of what the update writes, so there is no communication. In fp32 the
    target's weights are the EMA itself.
    """

    def __init__(self, engine: Any, twins: Iterable[tuple[Any, Any]]):
        """twins: pairs of a trained parameter and of its average; none is allowed. The EMA starts at the masters."""
        self.optimizer = engine.optimizer
        self.stage3 = is_stage3(self.optimizer)
        twin = dict(twins)
        self.shards: list[torch.Tensor | None] = []  # fp32, one a flat of masters(); None where there is no EMA
        self.targets: list[torch.Tensor | None] = []  # the target's weights: this rank's shard of them under ZeRO-3
        for flat, (master, parameters) in enumerate(
            zip(masters(self.optimizer), flat_parameters(self.optimizer), strict=True)
        ):
            if not flat_group(self.optimizer, flat)["ema"]:
                self.shards.append(None)
                self.targets.append(None)
                continue
            dtype = twin[parameters[0]].dtype
            bind = self._bind_partitioned if self.stage3 else self._bind_whole
            target, own = bind(master, parameters, twin)
            self.targets.append(target)
            self.shards.append(own if dtype == torch.float32 else torch.empty_like(master))
        if self.stage3:
            # A persistent parameter is gathered inside step(), before the EMA: the target would lag by one step.
            for parameter in twin.values():
                parameter.ds_persist = False
            trainable = [p for p in self.optimizer.persistent_parameters if p.requires_grad]
            self.optimizer.persistent_parameters[:] = trainable
        for shard, master in zip(self.shards, masters(self.optimizer), strict=True):
            if shard is not None:
                shard.copy_(master.detach())
        self.refresh_target()

    def _bind_partitioned(
        self, master: torch.Tensor, parameters: list, twin: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        target = torch.zeros_like(master, dtype=twin[parameters[0]].dtype)
        offset = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            twin[parameter].ds_tensor.data = target.narrow(0, offset, share)
            offset += share
        return target, target

    def _bind_whole(self, master: torch.Tensor, parameters: list, twin: dict) -> tuple[torch.Tensor, torch.Tensor]:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        target = torch.zeros(master.numel() * world_size, dtype=twin[parameters[0]].dtype, device=master.device)
        base = parameters[0]  # DeepSpeed lays a group's parameters end to end: offsets are distances in memory
        for parameter in parameters:
            offset = (parameter.data_ptr() - base.data_ptr()) // parameter.element_size()
            twin[parameter].data = target.narrow(0, offset, parameter.numel()).view(parameter.shape)
        return target, target.narrow(0, rank * master.numel(), master.numel())

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Average the masters in. Call after engine.step(), and only if the step was applied."""
        for shard, target, master in zip(self.shards, self.targets, masters(self.optimizer), strict=True):
            if shard is not None and target is not None:
                own = self._own(target, shard)
                ema_update(shard, master.detach(), momentum, own if own.dtype != torch.float32 else None)
                self._share(target, own)
        self._settle()

    @torch.no_grad()
    def refresh_target(self) -> None:
        """Write the averaged network's weights from the EMA, after the EMA was changed (a load)."""
        for shard, target in zip(self.shards, self.targets, strict=True):
            if shard is not None and target is not None:
                own = self._own(target, shard)
                if own.dtype != torch.float32:
                    own.copy_(shard)
                self._share(target, own)
        self._settle()

    def _own(self, target: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        return target if self.stage3 else target.narrow(0, dist.get_rank() * shard.numel(), shard.numel())

    def _share(self, target: torch.Tensor, own: torch.Tensor) -> None:
        if not self.stage3 and dist.get_world_size() > 1:
            dist.all_gather_into_tensor(target, own.clone())  # gloo refuses input and output that overlap

    def _settle(self) -> None:
        """Under ZeRO-3 wait until the weights are written: DeepSpeed gathers them on a stream that waits for no other.

        (DeepSpeed 0.19.8; its throughput timer, which is off here, hides that by waiting at every forward.)
        """
        if self.stage3 and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
