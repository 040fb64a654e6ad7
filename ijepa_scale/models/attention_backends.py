"""Kernels for attention over packed tokens: what each needs, how it is called, and which of them `auto` takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_kernels import dispatch
from ijepa_kernels.short_attention import short_attention
from ijepa_scale.models.attention import Attend, Sequences, packed_attention


@dataclass(frozen=True)
class Backend:
    load: Callable[[], Attend]  # raises ImportError where it is absent
    oldest: int  # the lowest and the highest major compute capability that it trains on
    newest: int
    install: str


class _IntoOneBuffer(torch.autograd.Function):
    """Attention whose backward writes the gradients of q, k and v where qkv's gradient has them.

    Those of unbind()'s parts are tensors of their own, which its backward stacks: 12 bytes more to move for each value
    of a token's width, in bf16. forward(q, k, v, lengths) gives the output and its normalizers, whatever they are;
    backward(normalizers, dout, q, k, v, out, dq, dk, dv, lengths, deterministic) fills dq, dk and dv. All by name.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv_T3HE: torch.Tensor, sequences: Sequences, forward: Callable, backward: Callable
    ) -> torch.Tensor:
        q, k, v = qkv_T3HE.unbind(1)
        out_THE, normalizers = forward(q=q, k=k, v=v, **_lengths(sequences))
        ctx.save_for_backward(qkv_T3HE, out_THE, normalizers)
        ctx.sequences, ctx.kernel = sequences, backward
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv_T3HE, out_THE, normalizers = ctx.saved_tensors
        into_T3HE = torch.empty_like(qkv_T3HE)
        tensors = dict(zip(("q", "k", "v"), qkv_T3HE.unbind(1), strict=True))
        tensors |= dict(zip(("dq", "dk", "dv"), into_T3HE.unbind(1), strict=True))
        tensors |= {"out": out_THE, "dout": grads[0].contiguous()}
        # Programs add to dq, in no order where none is asked for.
        deterministic = torch.are_deterministic_algorithms_enabled()
        ctx.kernel(normalizers, **tensors, **_lengths(ctx.sequences), deterministic=deterministic)
        return into_T3HE, None, None, None


def _lengths(sequences: Sequences) -> dict[str, Any]:
    bounds, longest = sequences.cu_seqlens, sequences.max_seqlen
    return {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}


# Kernels are called by functions with names, and bound to them by partial(): a model that holds one can be pickled.


def _attend_into_one_buffer(
    forward: Callable, backward: Callable, qkv_T3HE: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    return _IntoOneBuffer.apply(qkv_T3HE, sequences, forward, backward)


def _load_fa2() -> Attend:
    # Of the function itself: flash-attn-4 alone leaves a package flash_attn that holds nothing but `cute`.
    from flash_attn import flash_attn_varlen_qkvpacked_func as kernel

    return partial(_attend_fa2, kernel)


def _attend_fa2(kernel: Callable, qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    # Its own backward writes into one buffer.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return kernel(qkv_T3HE, sequences.cu_seqlens, sequences.max_seqlen, deterministic=deterministic)


def _load_fa3() -> Attend:
    import flash_attn_interface  # noqa: F401  # registers the operators

    operators = torch.ops.flash_attn_3
    if not (hasattr(operators, "fwd") and hasattr(operators, "bwd")):
        raise ImportError("this build registers no torch.ops.flash_attn_3: it is older than flash-attention 2.8")
    # In older builds what may be None has no default.
    forward, backward = (
        {argument.name: None for argument in operator.default._schema.arguments if not argument.has_default_value()}
        for operator in (operators.fwd, operators.bwd)
    )
    return partial(_attend_into_one_buffer, partial(_fa3_forward, forward), partial(_fa3_backward, backward))


def _fa3_forward(unset: dict[str, None], **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # num_splits: 0, its default, may split the keys of few sequences over programs; a batch has many.
    given |= {"softmax_scale": given["q"].shape[-1] ** -0.5, "is_causal": False, "num_splits": 1}
    return torch.ops.flash_attn_3.fwd.default(**{**unset, **given})[:2]


def _fa3_backward(unset: dict[str, None], normalizers: torch.Tensor, **given: Any) -> None:
    given |= {"softmax_lse": normalizers, "softmax_scale": given["q"].shape[-1] ** -0.5, "is_causal": False}
    torch.ops.flash_attn_3.bwd.default(**{**unset, **given})


def _load_fa4() -> Attend:
    from flash_attn.cute import flash_attn_varlen_func
    from flash_attn.cute.interface import _flash_attn_bwd

    forward = partial(flash_attn_varlen_func, return_lse=True)
    return partial(_attend_into_one_buffer, forward, partial(_fa4_backward, _flash_attn_bwd))


def _fa4_backward(kernel: Callable, normalizers: torch.Tensor, **given: Any) -> None:
    kernel(lse=normalizers, **given)


def _load_torch_varlen() -> Attend:
    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this build of torch has no flash attention")
    return _attend_torch_varlen


def _attend_torch_varlen(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """PyTorch's flash attention, by the operator that holds nothing else.

    torch.nn.attention.varlen takes cuDNN by rules that differ from version to version (2.14: on 9.x and 10.x, whatever
    the flags say), and cuDNN plans each number of tokens anew, in tens of milliseconds. The operator's gradient is
    _flash_attention_backward, which takes no buffer to write into: unbind's backward stacks what it gives.
    """
    bounds, longest = sequences.cu_seqlens, sequences.max_seqlen
    q, k, v = qkv_T3HE.unbind(1)
    dropout, causal, debug = 0.0, False, False
    operator = torch.ops.aten._flash_attention_forward.default
    return operator(q, k, v, bounds, bounds, longest, longest, dropout, causal, debug)[0]


def _load_triton() -> Attend:
    if dispatch.triton is None:
        raise ImportError("No module named 'triton'")
    return _attend_triton


def _attend_triton(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    return short_attention(qkv_T3HE, sequences.cu_seqlens)


def dense_by_cudnn(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """packed_attention() of sequences of one length by cuDNN, to be timed against its own: see docs/lab/speed.md.

    As an Attend it is the whole images' alone, whose shape stays the same: cuDNN plans each shape anew. On CUDA, bf16
    or fp16. Raises RuntimeError where cuDNN does not take it.
    """
    assert sequences.equal_lengths
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return packed_attention(qkv_T3HE, replace(sequences, attend=None))


NEWEST = 99
BACKENDS = {
    "fa2": Backend(_load_fa2, 8, NEWEST, "pip install flash-attn --no-build-isolation"),
    "fa3": Backend(_load_fa3, 9, 9, "build the folder hopper of github.com/Dao-AILab/flash-attention"),
    "fa4": Backend(_load_fa4, 9, NEWEST, "pip install --pre flash-attn-4"),  # below 9.0 it has no backward
    "torch_varlen": Backend(_load_torch_varlen, 8, NEWEST, "install torch for CUDA from pytorch.org"),
    "triton": Backend(_load_triton, 8, NEWEST, "pip install triton"),  # on 8.x not timed, so asked for
}
# By major compute capability, the fastest first. fa4 is never among them: its gradients were silently wrong more than
# once (Dao-AILab/flash-attention#2482, #2553, #2698), so it is taken only where it is asked for.
AUTO = {8: ("fa2", "torch_varlen"), 9: ("triton", "fa3", "fa2", "torch_varlen")}
AUTO_ELSEWHERE = ("torch_varlen",)
WIDEST = {"triton": 128}  # heads for which auto takes it: in wider ones its backward spills registers by the dozen


@dataclass(frozen=True)
class Choice:
    """name: a key of BACKENDS, or sdpa. attend: its call, None for sdpa. why: for the user."""

    name: str
    attend: Attend | None
    why: str


@dataclass(frozen=True)
class Choices:
    """What attends over packed tokens in each network, by the network's name."""

    networks: Mapping[str, Choice]

    @property
    def attend(self) -> dict[str, Attend | None]:
        """As Objective.build() takes them."""
        return {network: choice.attend for network, choice in self.networks.items()}

    @property
    def name(self) -> str:
        """One name where all are the same, else each network's."""
        return _said({network: choice.name for network, choice in self.networks.items()}, ", ")

    @property
    def why(self) -> str:
        return _said({network: choice.why for network, choice in self.networks.items()}, "; ")


def _said(words: Mapping[str, str], between: str) -> str:
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return between.join(f"{network}: {said}" for network, said in words.items())


def choose_attention(
    wanted: str, *, key: str = "model.attention", device: torch.device, dtype: torch.dtype, head_width: int
) -> Choice:
    """What attends over packed tokens on a device. wanted: auto, sdpa or a key of BACKENDS. key: what asks for it.

    Raises ValueError for a kernel that is not installed or does not fit, saying what to do.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return pick(
        wanted, key=key, major=major, dtype=dtype, head_width=head_width, load=lambda name: BACKENDS[name].load()
    )


def pick(
    wanted: str,
    *,
    key: str = "model.attention",
    major: int | None,
    dtype: torch.dtype,
    head_width: int,
    load: Callable[[str], Attend],
) -> Choice:
    """choose_attention() for a major compute capability (None: no CUDA device) and what can be loaded there."""
    if wanted == "sdpa":
        return Choice("sdpa", None, "asked for")
    order = (AUTO_ELSEWHERE if major is None else AUTO.get(major, AUTO_ELSEWHERE)) if wanted == "auto" else (wanted,)
    reasons: list[str] = []
    for name in order:
        reason = misfit(name, major, dtype, head_width)
        if not reason and wanted == "auto" and head_width > WIDEST.get(name, head_width):
            reason = f"is slow in heads wider than {WIDEST[name]}"
        if not reason:
            try:
                attend = load(name)
            except (ImportError, OSError) as error:  # OSError: a library that it links to is missing
                reason = f"cannot be imported ({' '.join(str(error).split())}); to install it: {BACKENDS[name].install}"
            else:
                return Choice(name, attend, "; ".join(reasons) or ("auto" if wanted == "auto" else "asked for"))
        reasons.append(f"{name} {reason}")
    if wanted != "auto":
        raise ValueError(f"{key}={reasons[0]}; or set it to auto")
    return Choice("sdpa", None, "; ".join(reasons))


def misfit(name: str, major: int | None, dtype: torch.dtype, head_width: int) -> str:
    """Why a kernel cannot do this, as the rest of a sentence that starts with its name; "" if it can."""
    backend = BACKENDS[name]
    if major is None:
        return "needs a CUDA device"
    if not backend.oldest <= major <= backend.newest:
        wants = f"{backend.oldest}.x" + (" or newer" if backend.newest == NEWEST else "")
        return f"trains on compute capability {wants}, this device has {major}.x"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {str(dtype).removeprefix('torch.')} (engine.precision)"
    if head_width % 8 or head_width > 256:
        return f"takes heads whose width is a multiple of 8 up to 256, not {head_width}"
    return ""
