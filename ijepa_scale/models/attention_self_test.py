"""The test of an attention kernel on the machine that is to train with it."""

from collections.abc import Collection, Mapping

import torch

from ijepa_scale.models.attention import Attend, Sequences, packed_attention, packed_attention_reference
from ijepa_scale.models.attention_backends import Choices, choose_attention

# How often eager bf16's own error is allowed, as in FlashAttention's tests. PyTorch's kernel of the CPU uses a quarter
# of what self_test() allows, and gradients that are 3% too large are past it.
OUTPUT_SLACK, GRADIENT_SLACK = 2.0, 3.0


def tested_attention(
    asked: Mapping[str, tuple[str, str]],
    heads: Mapping[str, tuple[int, int]],
    *,
    longest: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Choices:
    """What attends over packed tokens in each network, tested.

    asked: the key of the config and its value, by network. heads: (heads, width of a head), by network. longest: tokens
    of a sequence. Raises ValueError for a kernel that is asked for and does not fit, and for one that is wrong.
    """
    choices = {}
    for network, (key, wanted) in asked.items():
        shape = heads[network]
        choice = choose_attention(wanted, key=key, device=device, dtype=dtype, head_width=shape[1])
        if choice.attend is not None:
            self_test(choice.name, choice.attend, [shape], longest=longest, device=device, dtype=dtype, key=key)
        choices[network] = choice
    return Choices(choices)


def self_test(
    name: str,
    attend: Attend,
    head_shapes: Collection[tuple[int, int]],
    *,
    longest: int,
    device: torch.device,
    dtype: torch.dtype,
    key: str = "model.attention",
) -> None:
    """Hold a kernel to the definition in float64, output and gradients, within each sequence.

    head_shapes: (heads, head width), each tested on ragged sequences of 1 to `longest` tokens, the last of which stands
    for padding: no gradient comes in there. key: of the config, which chooses it. Raises ValueError for a kernel that
    is wrong, or fails.
    """
    lengths = [n for n in (longest, 1, 17, 64, 65, 129, longest // 2 + 1, min(40, longest)) if n <= longest]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    plain = Sequences(bounds, longest, sum(lengths))
    sequences = Sequences(bounds, longest, sum(lengths), attend)
    for heads, head_width in sorted(set(head_shapes)):
        where = f"{key}={name} on {device} at head width {head_width}"
        remedy = f"use {key}={'sdpa' if name == 'torch_varlen' else 'torch_varlen or sdpa'}"
        generator = torch.Generator().manual_seed(head_width)
        qkv = torch.randn(sum(lengths), 3, heads, head_width, generator=generator)
        upstream = torch.randn(sum(lengths), heads, head_width, generator=generator)
        upstream[-lengths[-1] :] = 0
        qkv, upstream = qkv.to(device, dtype), upstream.to(device, dtype)
        try:
            actual = _value_and_gradients(packed_attention, qkv, sequences, upstream)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a kernel's fault shows here, not in the step
        except Exception as error:
            raise ValueError(f"{where} failed its test ({' '.join(str(error).split())[:300]}); {remedy}") from error
        eager = _value_and_gradients(packed_attention_reference, qkv, plain, upstream)
        exact = _value_and_gradients(packed_attention_reference, qkv.double(), plain, upstream.double())
        eps = torch.finfo(dtype).eps
        # Where eager happens to be exact: of one token the gradients of q and k are 0.
        floor = eps / 16 * max(part.abs().max() for part in exact.values())
        for part in exact:
            slack = OUTPUT_SLACK if part == "output" else GRADIENT_SLACK
            pieces = zip(*(values[part].split(lengths) for values in (actual, eager, exact)), strict=True)
            for length, (ours, theirs, truth) in zip(lengths, pieces, strict=True):
                off = (ours - truth).abs().max()
                bound = slack * (theirs - truth).abs().max() + eps * truth.abs().max() + floor
                if not off <= bound:  # NaN, too
                    raise ValueError(
                        f"{where} gives a wrong {part} in a sequence of {length} tokens: off by {off.item():.3g}, "
                        f"allowed is {bound.item():.3g}; {remedy}"
                    )


def _value_and_gradients(
    call: Attend, qkv_T3HE: torch.Tensor, sequences: Sequences, upstream_THE: torch.Tensor
) -> dict[str, torch.Tensor]:
    """In float64, each (T, H, E)."""
    leaf = qkv_T3HE.detach().clone().requires_grad_()
    output = call(leaf, sequences)
    (gradient,) = torch.autograd.grad(output, leaf, upstream_THE)
    parts = {f"gradient of {name}": part for name, part in zip("qkv", gradient.unbind(1), strict=True)}
    return {name: part.detach().double() for name, part in {"output": output, **parts}.items()}
