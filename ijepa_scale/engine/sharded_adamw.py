"""ZeRO-1 and -2 in DeepSpeed's engine: gradients reduced into shards while the backward goes on, AdamW on each shard.

DeepSpeed's own optimizers of these stages all-reduce gradients (all ranks get all of them, in fp32), wait for the
device several times a step, and compute norms and sums of all gradients on every rank. Here a bucket of gradients is
sent once, to the ranks that own its parts. docs/lab/speed.md counts the bytes.

    backward -> each gradient into its bucket -> bucket full: reduce-scatter -> this rank's shard of its sum
    step     -> norm of the shards -> AdamW, weights, EMA: one pass over each shard -> all-gather of the weights starts
    forward  -> each block waits for its weights, the target encoder (engine/ema.py) for its own

With offload a bucket's gradient goes to the host, where masters, moments and EMA lie and AdamW runs. Its weights and
those of the average come back.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig

from ijepa_kernels.adamw_ema import adamw_ema
from ijepa_kernels.ema import ema_update
from ijepa_scale.engine.buckets import Bucket, buckets_of
from ijepa_scale.engine.muon import direction, gathered, own_updates


class ShardedAdamW(ZeROOptimizer):
    """What DeepSpeed's engine calls its optimizer at ZeRO-1 and -2. All ranks call everything alike.

    ZeRO-1 sends gradients once a step, ZeRO-2 after every micro-step, so that with accumulation a rank holds its part
    of their sum alone. Gradients travel in gradient_dtype, and are added up over micro-steps in fp32.
    """

    custom_loss_scaler = False
    external_loss_scale = None
    torch_autocast_gradscaler = None

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        param_names: dict[torch.nn.Parameter, str],
        *,
        bucket_size: int,
        gradient_dtype: torch.dtype,
        every_micro_step: bool,
        accumulation_steps: int,
        clip: float,
        boundary: Callable[[], bool],
        offload: bool,
    ):
        """optimizer: torch's, whose groups and state are used. boundary: whether this micro-step is the step's last.

        offload: whether masters, moments and EMA lie in the host's memory.
        """
        super().__init__()
        self.optimizer, self.param_names, self.clip, self.boundary = optimizer, param_names, clip, boundary
        self.offload_optimizer = offload
        self._travelling: dict[str, torch.Tensor] = {}  # memory of the host for what goes there and back
        self.dp_process_group = dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.overflow, self._global_grad_norm = False, torch.zeros(())
        self.buckets = buckets_of(optimizer.param_groups, bucket_size, self.rank, self.ranks, offload=offload)
        self.in_flight = 1
        self._at_once = self.buckets  # whose weights are waited for at the end of the step
        for group in optimizer.param_groups:
            group["params"] = [bucket.master for bucket in self.buckets if bucket.group is group]
        for bucket in self.buckets:
            bucket.master.requires_grad_()
            moments = {kind: torch.zeros_like(bucket.master) for kind in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), device=bucket.master.device)
            optimizer.state[bucket.master] = {"step": step, **moments}
        self.every_micro_step = every_micro_step and self.ranks > 1
        self.accumulates = accumulation_steps > 1
        own = self.buckets[0].weights.dtype
        self.travel_dtype = gradient_dtype if self.ranks > 1 else own
        # Added up here over micro-steps they are fp32. Where each is sent, or is all there is, they are as they travel.
        self.collected_dtype = torch.float32 if self.accumulates and not self.every_micro_step else self.travel_dtype
        self._sent: deque[tuple[Bucket, torch.Tensor, Any]] = deque()
        self._order, self._next = self._backward_order(), 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(bucket, index))
            for bucket in self.buckets
            for index, parameter in enumerate(bucket.parameters)
        ]

    def _backward_order(self) -> list[Bucket]:
        """In which buckets are sent, on every rank: that whose first parameter in the network comes last goes first."""
        place = {parameter: at for at, parameter in enumerate(self.param_names)}
        return sorted(self.buckets, key=lambda bucket: -min(place[p] for p in bucket.parameters))

    def gather_behind(self, model: torch.nn.Module, whole: type[torch.nn.Module]) -> None:
        """Have modules of class whole, and the rest of each network, wait for their weights when their forward begins.

        A network is one of the model's children. Other weights, and all without this, are waited for in the step.
        """
        of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        networks = set(chain.from_iterable(network.parameters() for network in model.children()))
        self._at_once = [bucket for bucket in self.buckets if not networks.issuperset(bucket.parameters)]
        for network in model.children():
            rest = set(network.parameters())
            for module in network.modules():
                if isinstance(module, whole):
                    rest -= set(module.parameters())
                    self._wait_before(module, {of[p] for p in module.parameters() if p in of})
            self._wait_before(network, {of[p] for p in rest if p in of})

    def _wait_before(self, module: torch.nn.Module, buckets: set[Bucket]) -> None:
        if buckets and self.ranks > 1:
            module.register_forward_pre_hook(lambda module, arguments: self.wait(buckets))

    def wait(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Have the weights of these buckets, or of all, on this rank; on a GPU it is the stream that waits."""
        for bucket in self.buckets if buckets is None else buckets:
            if bucket.arriving is not None:
                bucket.arriving.wait()
                bucket.arriving = None

    # --- during the backward

    def _hook(self, bucket: Bucket, index: int) -> Any:
        # Weak: what a parameter's hook refers to is never collected, and would keep the model with it.
        optimizer, place = weakref.proxy(self), self.buckets.index(bucket)
        return lambda parameter: optimizer._take(optimizer.buckets[place], index, parameter)

    @torch.no_grad()
    def _take(self, bucket: Bucket, index: int, parameter: torch.nn.Parameter) -> None:
        gradient, parameter.grad = _of(parameter.grad), None
        bucket.add(index, gradient, self.collected_dtype)
        if not bucket.awaited and self._sends():
            self._send_complete()

    def _sends(self) -> bool:
        return self.ranks > 1 and (self.every_micro_step or self.boundary())

    def _send_complete(self) -> None:
        while self._next < len(self._order) and not self._order[self._next].awaited:
            if len(self._sent) == self.in_flight:
                self._collect(*self._sent.popleft())
            bucket = self._order[self._next]
            assert bucket.gradients is not None
            part = torch.empty(bucket.share, dtype=self.travel_dtype, device=bucket.weights.device)
            # as it travels, kept until it has arrived
            bucket.gradients = bucket.gradients.to(self.travel_dtype)
            self._sent.append((bucket, part, dist.reduce_scatter_tensor(part, bucket.gradients, async_op=True)))
            self._next += 1

    def _collect(self, bucket: Bucket, part: torch.Tensor, work: Any) -> None:
        """On a GPU the wait is the stream's, not the host's."""
        work.wait()
        bucket.release()
        if bucket.gradient is not None:
            bucket.gradient.add_(part)
        else:
            adds_up = self.accumulates and self.every_micro_step
            bucket.gradient = part.float() if adds_up else part

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The engine calls it at the end of a backward that may send: at ZeRO-1 the step's last alone."""
        for bucket in self.buckets:
            bucket.complete(self.collected_dtype)
        if self._sends():
            self._send_complete()
            while self._sent:
                self._collect(*self._sent.popleft())
            self._next = 0
        elif self.ranks == 1 and self.boundary():
            for bucket in self.buckets:
                bucket.gradient = bucket.gradients

    overlapping_partition_gradients_reduce_epilogue = reduce_gradients  # its name at ZeRO-2

    def backward_epilogue(self, **kwargs: Any) -> None:
        """After every backward."""
        for bucket in self.buckets:
            bucket.awaited = set(range(len(bucket.parameters)))

    # --- the step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights, or leave all as it is where the gradients are not finite: the one wait for the device."""
        norm = self._norm()
        self.overflow = not bool(torch.isfinite(norm))
        self._global_grad_norm = torch.full_like(norm, torch.inf) if self.overflow else norm
        if not self.overflow:
            self._update(norm)
        self.zero_grad()

    def _norm(self) -> torch.Tensor:
        """Of the mean over ranks of all gradients, () fp64."""
        # In fp32 a CPU's is off by 5e-4, as it adds up in few sums. A GPU would make a copy of all gradients in fp64.
        device = self.buckets[0].weights.device
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        parts = [torch.linalg.vector_norm(_of(bucket.gradient), dtype=dtype) for bucket in self.buckets]
        total = torch.stack(parts).double().square_().sum()
        if self.ranks > 1:
            dist.all_reduce(total)
        return total.sqrt_() / self.ranks

    def _update(self, norm: torch.Tensor) -> None:
        self.wait()  # for weights that no forward has used: they are written to below
        scale: float | torch.Tensor = 1.0 / self.ranks  # what was reduced are sums
        if self.clip:
            scale = ((self.clip / (norm + 1e-6)).clamp_(max=1.0) / self.ranks).float()
        for bucket in self.buckets:
            self.optimizer.state[bucket.master]["step"] += 1
            if self.offload_optimizer:
                self._update_on_host(bucket, scale)
            else:
                weight = None if bucket.master is bucket.own else bucket.own
                target = None if bucket.target_own is bucket.ema else bucket.target_own
                self._update_bucket(bucket, _of(bucket.gradient), scale, weight, target)
        self._share_weights()

    def _update_on_host(self, bucket: Bucket, scale: float | torch.Tensor) -> None:
        gradient = self._on_host("gradient", _of(bucket.gradient)).copy_(_of(bucket.gradient))
        weight = self._on_host("weight", bucket.own)
        target = None if bucket.target_own is None else self._on_host("target", bucket.target_own)
        scale = scale.cpu() if isinstance(scale, torch.Tensor) else scale
        self._update_bucket(bucket, gradient, scale, weight, target)
        bucket.own.copy_(weight)
        if target is not None:
            _of(bucket.target_own).copy_(target)

    def _on_host(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Memory for one bucket at a time, page-locked so that a GPU copies at its link's full rate."""
        if name not in self._travelling:
            largest = max(bucket.share for bucket in self.buckets)
            self._travelling[name] = torch.empty(largest, dtype=like.dtype, pin_memory=like.is_cuda)
        return self._travelling[name][: like.numel()]

    def _update_bucket(
        self,
        bucket: Bucket,
        gradient: torch.Tensor,
        scale: float | torch.Tensor,
        weight: torch.Tensor | None,
        target: torch.Tensor | None,
    ) -> None:
        """weight, target: where copies of the master and of its average go; beside the master, like the gradient."""
        group, state = bucket.group, self.optimizer.state[bucket.master]
        if group.get("muon"):
            self._update_matrices(bucket, direction(gradient, state["exp_avg"], scale))
            if weight is not None:
                weight.copy_(bucket.master)
            if bucket.ema is not None:
                ema_update(bucket.ema, bucket.master.detach(), group["ema_momentum"], target)
            return
        adamw_ema(
            bucket.master,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"],
            grad_scale=scale,
            weight=weight,
            ema=bucket.ema,
            momentum=group["ema_momentum"] if bucket.ema is not None else 1.0,
            target=target,
        )

    def _update_matrices(self, bucket: Bucket, own: torch.Tensor) -> None:
        """own: this rank's part of what is made orthogonal, on the device that weights are on, whatever its own."""
        group, master = bucket.group, bucket.master.detach()
        whole = gathered(own.to(bucket.own.device), self.travel_dtype)
        shapes = [parameter.shape for parameter in bucket.parameters]
        master.mul_(1 - group["lr"] * group["weight_decay"])
        for place, values in own_updates(whole, shapes, self.rank * bucket.share, bucket.share):
            master[place : place + values.numel()].sub_(values.to(master.device), alpha=group["lr"])

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Write the weights that the forward uses from the masters."""
        for bucket in self.buckets:
            if bucket.master is not bucket.own:
                bucket.own.copy_(bucket.master)
        self._share_weights()
        self.wait()

    def _share_weights(self) -> None:
        for bucket in reversed(self._order):  # the first that the forward needs goes first
            bucket.arriving = share(bucket.weights, bucket.own)
        self.wait(self._at_once)

    @torch.no_grad()
    def write_averages(self) -> None:
        """This rank's part of the averaged network's weights from its EMA."""
        for bucket in self.buckets:
            if bucket.ema is not None and bucket.target_own is not bucket.ema:
                _of(bucket.target_own).copy_(bucket.ema)

    def share_averages(self) -> list[Any]:
        """Start to bring the averaged network's weights to all ranks; what to wait for."""
        averaged = [bucket for bucket in self.buckets if bucket.target is not None]
        works = [share(_of(bucket.target), _of(bucket.target_own)) for bucket in averaged]
        return [work for work in works if work is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for bucket in self.buckets:
            bucket.release()
            bucket.gradient = None
            for parameter in bucket.parameters:
                parameter.grad = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def fragments(self) -> Iterator[tuple[str, int, int, int, int]]:
        """(parameter's name, its first element owned here, how many, flat, first element there) of all owned runs."""
        for flat, bucket in enumerate(self.buckets):
            low = self.rank * bucket.share
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=False):
                start, stop = max(low, offset), min(low + bucket.share, offset + parameter.numel())
                if start < stop:
                    yield self.param_names[parameter], start - offset, stop - start, flat, start - low


def _of(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def share(whole: torch.Tensor, own: torch.Tensor) -> Any:
    """Start to give this rank's part of a flat tensor to all, and to get theirs; what to wait for, None of one rank."""
    if dist.get_world_size() == 1:
        return None
    if dist.get_backend() != "nccl":
        own = own.clone()  # gloo refuses input and output that overlap
    return dist.all_gather_into_tensor(whole, own, async_op=True)


class Engine(deepspeed.DeepSpeedEngine):
    """DeepSpeed's, with the optimizer above."""

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> ShardedAdamW:
        assert isinstance(optimizer, torch.optim.AdamW)
        return ShardedAdamW(
            optimizer,
            self.param_names,
            bucket_size=self.zero_reduce_bucket_size(),
            gradient_dtype=self.communication_data_type,
            every_micro_step=self.zero_optimization_partition_gradients(),
            accumulation_steps=self.gradient_accumulation_steps(),
            clip=self.gradient_clipping(),
            boundary=self.is_gradient_accumulation_boundary,
            offload=self.zero_cpu_offload(),
        )

    _configure_bf16_optimizer = _configure_zero_optimizer  # what it is called at ZeRO-1


def sharded_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, in_flight: int
) -> Engine:
    """As deepspeed.initialize() makes it. in_flight: how many buckets of gradients may be on their way at once."""
    engine = Engine(args=None, model=model, optimizer=optimizer, config=config, config_class=DeepSpeedConfig(config))
    engine.optimizer.in_flight = in_flight
    return engine
