"""The model under DeepSpeed ZeRO: its config, initialize(), and where each rank keeps its part of the fp32 state."""

import contextlib
import copy
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from ijepa_scale.engine.distributed import quiet
from ijepa_scale.engine.muon import MuonAndAdamW

# Elements of gradients that are sent at once. DeepSpeed's 5e8 would take 2 GB for buffers, whatever the model's size.
BUCKET = 50_000_000
# At ZeRO-1 and -2 so many buckets are on their way at once: their gradients are in memory, and the next bucket's.
IN_FLIGHT = 2

# Settings of engine.deepspeed that break what this package builds on ZeRO, with the reason.
REFUSED = {
    "train_batch_size": "it follows from optimization.global_batch_size",
    "train_micro_batch_size_per_gpu": "set optimization.micro_batch_size",
    "gradient_accumulation_steps": "it follows from optimization.global_batch_size and micro_batch_size",
    "gradient_clipping": "set optimization.clip_grad_norm",
    "optimizer": "the optimizer is AdamW with the groups of ijepa_scale/engine/optim.py",
    "scheduler": "schedules are functions of the step (ijepa_scale/engine/schedules.py)",
    "fp16": "fp16's loss scaling would skip steps at random; set engine.precision to bf16 or fp32",
    "bf16": "set engine.precision",
    "bfloat16": "set engine.precision",
    "data_types.grad_accum_dtype": "gradients are accumulated in fp32",
    "zero_optimization.stage": "set engine.zero_stage",
    "zero_optimization.compute_grad_norm": "metrics.jsonl has the norm of every step",
    "zero_optimization.round_robin_gradients": "it reorders the shards, and the EMA would average the wrong weights",
    "zero_optimization.cpu_offload": "set engine.offload_optimizer=cpu",
    "zero_optimization.cpu_offload_param": "the averaged network's shards are rebound on the device",
    "zero_optimization.zero_quantized_nontrainable_weights": "it would quantize the averaged network",
    "zero_optimization.zenflow": "its optimizer is one of DeepSpeed's, and steps beside the EMA",
    "zero_optimization.offload_optimizer": "set engine.offload_optimizer=cpu",
    "zero_force_ds_cpu_optimizer": "the optimizer on the host is torch's AdamW, which no compiler has to build",
    "zero_optimization.offload_param": "the averaged network's shards are rebound on the device",
    "zero_optimization.zero_hpz_partition_size": "secondary shards of the averaged network would never be updated",
    "zero_optimization.mics_shard_size": "the averaged network is sharded over all ranks",
    "zero_optimization.zero_quantized_weights": "quantized gathers would change the averaged network",
}


def deepspeed_config(
    *,
    zero_stage: int,
    precision: str,
    micro_batch_size: int,
    accumulation_steps: int,
    clip_grad_norm: float = 0.0,
    gradient_dtype: str = "fp32",
    offload: bool = False,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's config. precision: fp32 or bf16. gradient_dtype: in which they are sent, the same.

    offload: whether masters, moments and EMA lie in the host's memory, and are updated there. extra: engine.deepspeed,
    merged last.

    Raises ValueError for a setting in extra that would break the sharded EMA or contradict another key.
    """
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": BUCKET}
    if zero_stage == 3:
        # Its replacement of torch.nn.functional.linear is process-wide and changes bf16 gradients by 2e-3.
        zero["memory_efficient_linear"] = False
        # A step copies the gradients of one sub-group at a time. DeepSpeed's 1e9 is all of them: 4 bytes a parameter.
        zero["sub_group_size"] = BUCKET
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip_grad_norm,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": gradient_dtype,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,  # engine/muon.py; AdamW's is known to it
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every forward and every step
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False  # its own is C++ that is built at the first start
    for key, reason in REFUSED.items():
        section, _, leaf = key.rpartition(".")
        values = (extra or {}).get(section, {}) if section else extra or {}
        if not isinstance(values, dict):
            raise ValueError(f"engine.deepspeed.{section} is a section and takes keys, got {values!r}")
        if leaf in values:
            raise ValueError(f"engine.deepspeed.{key} = {values[leaf]!r} is refused: {reason}")
    unheeded = sorted(set((extra or {}).get("zero_optimization") or {}) - {"stage", "reduce_bucket_size"})
    if unheeded and zero_stage < 3:
        warnings.warn(
            f"engine.deepspeed.zero_optimization: {', '.join(unheeded)} has no effect at "
            f"engine.zero_stage={zero_stage}, whose optimizer heeds reduce_bucket_size alone",
            stacklevel=2,
        )
    return _merged(config, extra or {})


def check_settings(settings: dict[str, Any], extra: dict[str, Any]) -> None:
    """ValueError for what DeepSpeed does not take of extra, which is engine.deepspeed: before anything is opened.

    settings: deepspeed_config()'s.
    """
    if not extra:
        return
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        with quiet():
            DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # its assertions, pydantic's errors and those of wrong types have no common one
        said = str(error)
        if isinstance(error, ValidationError):  # without the values, which may be secrets
            said = "; ".join(f"{'.'.join(map(str, one['loc']))} ({one['msg']})" for one in error.errors())
        raise ValueError(
            f"engine.deepspeed ({', '.join(map(str, extra))}) is refused by DeepSpeed: {' '.join(said.split())}"
        ) from error
    for monitor, package in {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}.items():
        if (extra.get(monitor) or {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(f"engine.deepspeed.{monitor} needs the package {package}: install it, or leave it out")


def _merged(base: dict[str, Any], extra: dict[str, Any], path: str = "engine.deepspeed") -> dict[str, Any]:
    """ValueError for a value of another type than the one in its place, over which DeepSpeed would fall in training."""
    merged = dict(base)
    for key, value in extra.items():
        held = base.get(key)
        kinds = (int, float) if type(held) in (int, float) else type(held)
        if key in base and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(held, bool)):
            raise ValueError(f"{path}.{key} wants a value as {held!r}, got {value!r}")
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value, f"{path}.{key}") if both else value
    return merged


@contextlib.contextmanager
def building_context(config: dict[str, Any]) -> Iterator[None]:
    """Where to build the model: under ZeRO-3 parameters are cut as they are made, so no rank holds the whole.

    Weights are undefined there, until initialize() or write_weights().
    """
    with contextlib.ExitStack() as stack:
        if config["zero_optimization"]["stage"] == 3:
            import deepspeed

            class Parts(deepspeed.zero.Init):
                """Without a broadcast of each parameter from rank 0: its values do not stay."""

                def _zero_init_param(self, parameter: Any) -> None:
                    self._convert_to_deepspeed_param(parameter)
                    parameter.partition()

            if "bf16" in config:  # else it would make them in fp32 first, which leaves holes in a CPU's memory
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(torch.bfloat16)
            stack.enter_context(Parts(config_dict_or_path=config))
        stack.enter_context(_Undrawn())
        yield


class _Undrawn(TorchFunctionMode):
    """Parameters stay as they are allocated: torch would draw random weights, minutes of them for 2 B parameters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def write_weights(
    parameters: Iterable[tuple[str, Any]], initial: Callable[[str, torch.Size], torch.Tensor], dtype: torch.dtype
) -> None:
    """Make parameters initial(name, shape), in dtype, or this rank's parts of them where ZeRO-3 has cut them.

    At most one of them is held whole in fp32.
    """
    for name, parameter in parameters:
        if not hasattr(parameter, "ds_tensor"):
            parameter.data = initial(name, parameter.shape).to(parameter.device, dtype, copy=True)
            continue
        shard = parameter.ds_tensor
        start = dist.get_rank(parameter.ds_process_group) * shard.numel()
        values = initial(name, parameter.ds_shape).flatten()[start : start + shard.numel()]
        shard.zero_()
        shard[: values.numel()].copy_(values)


def initialize(
    model: torch.nn.Module,
    config: dict[str, Any],
    initial: Callable[[str, torch.Size], torch.Tensor],
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
    *,
    whole: type[torch.nn.Module],
) -> Any:
    """The DeepSpeed engine, its weights and fp32 masters at initial(name, shape): fp32, whatever the stage.

    whole: modules of this class have their weights gathered together under ZeRO-3.
    """
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    write_weights([(name, p) for name, p in model.named_parameters() if name not in trained], initial, dtype)
    for parameter in trained.values():  # which are written from their masters, below
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.zero_()  # for the padding at its end
        elif parameter.dtype != dtype:
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    if "bf16" not in config:
        # oneDNN keeps its code for 1,024 shapes. In fp32 it does GELU alone, of new shapes at every step: what it keeps
        # lies between the step's tensors, whose memory then cannot be put together again. A step has some ten shapes.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    with quiet():
        if config["zero_optimization"]["stage"] == 3:
            import deepspeed
            from deepspeed.utils import set_z3_leaf_modules

            # A block's weights are gathered together: its forward uses them itself, and large transfers are quicker.
            set_z3_leaf_modules(model, [whole])
            engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
            if isinstance(engine.optimizer.optimizer, MuonAndAdamW):
                engine.optimizer.optimizer.bind(masters(engine.optimizer), flat_parameters(engine.optimizer))
        else:
            from ijepa_scale.engine.sharded_adamw import sharded_engine  # which imports deepspeed

            engine = sharded_engine(model, make_optimizer(model), config, in_flight=IN_FLIGHT)
            engine.optimizer.gather_behind(model, whole)
    for module in model.modules():
        if isinstance(module, whole):
            module.engine_hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)  # type: ignore[assignment]
    for buffer in model.buffers():  # a model made inside zero.Init is not moved as a whole
        buffer.data = buffer.data.to(engine.device)
    # DeepSpeed's masters start from the weights rounded to bf16; ours from the fp32 values.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    flats = masters(engine.optimizer)
    with torch.no_grad():
        name, values = "", torch.empty(0)
        for fragment in fragments(engine.optimizer):
            if fragment.name != name:
                name, values = fragment.name, initial(fragment.name, shapes[fragment.name]).flatten()
            fragment.of(flats).copy_(values[fragment.start : fragment.start + fragment.numel])
    refresh_weights(engine.optimizer)
    return engine


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that this rank owns: name[start : start + numel], at flat[offset]."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int

    def of(self, flats: list[torch.Tensor]) -> torch.Tensor:
        return flats[self.flat].narrow(0, self.offset, self.numel)


def is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def is_offloaded(optimizer: Any) -> bool:
    """Whether masters, moments and EMA lie in the host's memory."""
    return bool(optimizer.offload_optimizer)


def masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 master weights: one a bucket, or one a sub-group under ZeRO-3."""
    if is_stage3(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [bucket.master for bucket in optimizer.buckets]


def flat_parameters(optimizer: Any) -> list[list[Any]]:
    """The parameters, with what DeepSpeed attached to them, in each flat of masters(), in order."""
    return list(optimizer.fp16_groups) if is_stage3(optimizer) else [bucket.parameters for bucket in optimizer.buckets]


def flat_group(optimizer: Any, flat: int) -> dict[str, Any]:
    """The optimizer's parameter group (lr, ema, name, ...) that a flat of masters() belongs to."""
    if is_stage3(optimizer):
        return optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[flat]]
    return optimizer.buckets[flat].group


def fragments(optimizer: Any) -> Iterator[Fragment]:
    """All runs of parameters whose master weights this rank owns, in every stage."""
    if not is_stage3(optimizer):
        yield from (Fragment(*run) for run in optimizer.fragments())
        return
    for flat, parameters in enumerate(flat_parameters(optimizer)):
        offset = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = dist.get_rank(parameter.ds_process_group) * share
            numel = max(0, min(share, parameter.ds_numel - start))
            if numel:
                yield Fragment(optimizer.param_names[parameter], start, numel, flat, offset)
            offset += share


def refresh_weights(optimizer: Any) -> None:
    """Write the weights that the forward uses from the fp32 masters, after these were changed."""
    if not is_stage3(optimizer):
        optimizer.update_lp_params()
        return
    for flat, master in enumerate(masters(optimizer)):
        optimizer.fp16_partitioned_groups_flat[flat].data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(flat)
    persistent = [parameter for parameter in optimizer.persistent_parameters if parameter.requires_grad]
    if persistent:  # kept gathered between steps: gather them anew
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
