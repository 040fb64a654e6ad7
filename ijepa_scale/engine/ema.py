"""Averaged networks under ZeRO, such as a target encoder: an fp32 EMA sharded exactly like the fp32 master weights."""

from collections.abc import Iterable
from typing import Any

import torch

from ijepa_kernels.ema import ema_update
from ijepa_scale.engine.zero import flat_group, flat_parameters, is_offloaded, is_stage3, masters


class ShardedEMA:
    """Each rank averages only its own part of the master weights and writes its part of the averaged network's weights.

    ZeRO-1 and -2: the target's weights are views of one flat buffer a bucket. The step writes this rank's part, in the
    pass that updates the masters; update() starts the all-gather, which the target's next forward waits for.
    ZeRO-3: the target's own shards are views of what update() writes, so there is no communication. In fp32 the
    target's weights are the EMA itself.
    Where the optimizer's state lies in the host's memory the EMA lies beside it, and the target's weights are a copy.
    """

    def __init__(self, engine: Any, twins: Iterable[tuple[Any, Any]]):
        """twins: pairs of a trained parameter and of its average; none is allowed. The EMA starts at the masters."""
        self.optimizer = engine.optimizer
        self.stage3 = is_stage3(self.optimizer)
        twin = dict(twins)
        self.shards: list[torch.Tensor | None] = []  # fp32, one a flat of masters(); None where there is no EMA
        self.targets: list[torch.Tensor | None] = []  # the target's weights: this rank's shard of them under ZeRO-3
        self._on_their_way: list[Any] = []
        for flat, parameters in enumerate(flat_parameters(self.optimizer)):
            averaged = flat_group(self.optimizer, flat)["ema"]
            bind = self._bind_partitioned if self.stage3 else self._bind_whole
            shard, target = bind(flat, [twin[p] for p in parameters]) if averaged else (None, None)
            self.shards.append(shard)
            self.targets.append(target)
        if self.stage3:
            # A persistent parameter is gathered inside step(), before the EMA: the target would lag by one step.
            for parameter in twin.values():
                parameter.ds_persist = False
            trainable = [p for p in self.optimizer.persistent_parameters if p.requires_grad]
            self.optimizer.persistent_parameters[:] = trainable
        else:
            averages = set(twin.values())
            for module in engine.module.children():
                if averages and averages.issuperset(module.parameters()):
                    module.register_forward_pre_hook(lambda module, arguments: self.wait())
        for shard, master in zip(self.shards, masters(self.optimizer), strict=True):
            if shard is not None:
                shard.copy_(master.detach())
        self.refresh_target()

    def _bind_partitioned(self, flat: int, averages: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        master = masters(self.optimizer)[flat]
        target = torch.zeros(master.numel(), dtype=averages[0].dtype, device=averages[0].ds_tensor.device)
        offset = 0
        for parameter in averages:
            share = parameter.partition_numel()
            parameter.ds_tensor.data = target.narrow(0, offset, share)
            offset += share
        alone = target.dtype == torch.float32 and not is_offloaded(self.optimizer)
        return (target if alone else torch.empty_like(master, requires_grad=False)), target

    def _bind_whole(self, flat: int, averages: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.optimizer.buckets[flat].average(averages)

    @torch.no_grad()
    def update(self) -> None:
        """Average the masters in, by their groups' ema_momentum. Call after engine.step(), if it was applied."""
        if not self.stage3:  # where the step has done it
            self._on_their_way = self.optimizer.share_averages()
            return
        for flat, (shard, target) in enumerate(zip(self.shards, self.targets, strict=True)):
            if shard is not None and target is not None:
                momentum = flat_group(self.optimizer, flat)["ema_momentum"]
                copy = None if target is shard or is_offloaded(self.optimizer) else target
                ema_update(shard, masters(self.optimizer)[flat].detach(), momentum, copy)
                if is_offloaded(self.optimizer):
                    target.copy_(shard)
        self._settle()

    @torch.no_grad()
    def refresh_target(self) -> None:
        """Write the averaged network's weights from the EMA, after the EMA was changed (a load)."""
        if self.stage3:
            for shard, target in zip(self.shards, self.targets, strict=True):
                if shard is not None and target is not None and target is not shard:
                    target.copy_(shard)
            self._settle()
        else:
            self.optimizer.write_averages()
            self._on_their_way = self.optimizer.share_averages()
            self.wait()

    def wait(self) -> None:
        """Have the averaged network's weights on this rank: before they are read elsewhere than in its forward."""
        for work in self._on_their_way:
            work.wait()
        self._on_their_way = []

    def _settle(self) -> None:
        """Under ZeRO-3 wait until the weights are written: DeepSpeed gathers them on a stream that waits for no other.

        (DeepSpeed 0.19.8; its throughput timer, which is off here, hides that by waiting at every forward.)
        """
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
