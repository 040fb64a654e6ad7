"""Kernels for attention over packed tokens: what each needs, how it is called, and which of them `auto` takes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_scale.models.attention import Attend, Sequences


@dataclass(frozen=True)
class Backend:
    load: Callable[[], Attend]  # raises ImportError where it is absent
    oldest: int  # the lowest and the highest major compute capability that it trains on
    newest: int
    install: str


def _deterministic() -> dict[str, bool]:
    # Only when asked for: some builds of FlashAttention-3 lack the argument (Dao-AILab/flash-attention#1766).
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    # FlashAttention-4 and older builds of 3 return the log-sum-exp, too.
    return result[0] if isinstance(result, tuple) else result


# Kernels are called by functions with names, and bound to them by partial(): a model that holds one can be pickled.


def _load_fa2() -> Attend:
    # Of the function itself: flash-attn-4 alone leaves a package flash_attn that holds nothing but `cute`.
    from flash_attn import flash_attn_varlen_qkvpacked_func as kernel

    return partial(_attend_fa2, kernel)


def _attend_fa2(kernel: Callable, qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    return kernel(qkv_T3HE, sequences.cu_seqlens, sequences.max_seqlen, **_deterministic())


def _load_fa3() -> Attend:
    from flash_attn_interface import flash_attn_varlen_func as kernel

    return partial(_attend_fa3, kernel)


def _attend_fa3(kernel: Callable, qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    bounds, longest = sequences.cu_seqlens, sequences.max_seqlen
    return _first(kernel(*qkv_T3HE.unbind(1), bounds, bounds, longest, longest, **_deterministic()))


def _load_fa4() -> Attend:
    from flash_attn.cute import flash_attn_varlen_func as kernel

    return partial(_attend_fa4, kernel)


def _attend_fa4(kernel: Callable, qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    q, k, v = qkv_T3HE.unbind(1)
    result = kernel(  # by keyword: its fourth argument is not what those of the older versions is
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=sequences.cu_seqlens,
        cu_seqlens_k=sequences.cu_seqlens,
        max_seqlen_q=sequences.max_seqlen,
        max_seqlen_k=sequences.max_seqlen,
        **_deterministic(),
    )
    return _first(result)


def _load_torch_varlen() -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this build of torch has no flash attention")
    return partial(_attend_torch_varlen, varlen_attn)


def _attend_torch_varlen(kernel: Callable, qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    bounds, longest = sequences.cu_seqlens, sequences.max_seqlen
    q, k, v = qkv_T3HE.unbind(1)
    if torch.backends.cuda.cudnn_sdp_enabled():
        # torch 2.15 would take cuDNN, which plans each new shape anew (55-70 ms, flashinfer-ai/flashinfer#5245) and
        # whose backward wrote out of bounds (pytorch/pytorch#186142). A run has it off (engine/distributed.py)
        # and does not come here: this changes the state of the process, in 9 to 18 us.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _first(kernel(q, k, v, bounds, bounds, longest, longest))
    return _first(kernel(q, k, v, bounds, bounds, longest, longest))


NEWEST = 99
BACKENDS = {
    "fa2": Backend(_load_fa2, 8, NEWEST, "pip install flash-attn --no-build-isolation"),
    "fa3": Backend(_load_fa3, 9, 9, "build the folder hopper of github.com/Dao-AILab/flash-attention"),
    "fa4": Backend(_load_fa4, 9, NEWEST, "pip install --pre flash-attn-4"),  # below 9.0 it has no backward
    "torch_varlen": Backend(_load_torch_varlen, 8, NEWEST, "install torch for CUDA from pytorch.org"),
}
# By major compute capability, the fastest first. fa4 is never among them: its gradients were silently wrong more than
# once (Dao-AILab/flash-attention#2482, #2553, #2698), so it is taken only where it is asked for.
AUTO = {8: ("fa2", "torch_varlen"), 9: ("fa3", "torch_varlen", "fa2")}
AUTO_ELSEWHERE = ("torch_varlen",)


@dataclass(frozen=True)
class Choice:
    """name: a key of BACKENDS, or sdpa. attend: its call, None for sdpa. why: for the user."""

    name: str
    attend: Attend | None
    why: str


def choose_attention(wanted: str, *, device: torch.device, dtype: torch.dtype, head_widths: Collection[int]) -> Choice:
    """What attends over packed tokens on a device. wanted: auto, sdpa or a key of BACKENDS.

    Raises ValueError for a kernel that is not installed or does not fit, saying what to do.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return pick(wanted, major=major, dtype=dtype, head_widths=head_widths, load=lambda name: BACKENDS[name].load())


def pick(
    wanted: str,
    *,
    major: int | None,
    dtype: torch.dtype,
    head_widths: Collection[int],
    load: Callable[[str], Attend],
) -> Choice:
    """choose_attention() for a major compute capability (None: no CUDA device) and what can be loaded there."""
    if wanted == "sdpa":
        return Choice("sdpa", None, "as model.attention says")
    order = (AUTO_ELSEWHERE if major is None else AUTO.get(major, AUTO_ELSEWHERE)) if wanted == "auto" else (wanted,)
    reasons: list[str] = []
    for name in order:
        reason = misfit(name, major, dtype, head_widths)
        if not reason:
            try:
                attend = load(name)
            except (ImportError, OSError) as error:  # OSError: a library that it links to is missing
                reason = f"cannot be imported ({' '.join(str(error).split())}); to install it: {BACKENDS[name].install}"
            else:
                return Choice(name, attend, "; ".join(reasons) or f"model.attention={wanted}")
        reasons.append(f"{name} {reason}")
    if wanted != "auto":
        raise ValueError(f"model.attention={reasons[0]}; or leave it at auto")
    return Choice("sdpa", None, "; ".join(reasons))


def misfit(name: str, major: int | None, dtype: torch.dtype, head_widths: Collection[int]) -> str:
    """Why a kernel cannot do this, as the rest of a sentence that starts with its name; "" if it can."""
    backend = BACKENDS[name]
    if major is None:
        return "needs a CUDA device"
    if not backend.oldest <= major <= backend.newest:
        wants = f"{backend.oldest}.x" + (" or newer" if backend.newest == NEWEST else "")
        return f"trains on compute capability {wants}, this device has {major}.x"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {str(dtype).removeprefix('torch.')} (engine.precision)"
    wrong = sorted(width for width in set(head_widths) if width % 8 or width > 256)
    if wrong:
        return f"takes heads whose width is a multiple of 8 up to 256, not {', '.join(map(str, wrong))}"
    return ""
