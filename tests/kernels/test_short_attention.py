from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from ijepa_kernels import short_attention as file
from ijepa_kernels.dispatch import recording
from ijepa_kernels.short_attention import short_attention, short_attention_definition
from tests.kernels.accuracy import (
    DTYPES,
    INTERPRETED,
    Filled,
    assert_as_exact_as_definition,
    loads_its_bounds,
    value_and_grads,
    values,
)

RAGGED = [0, 1, 63, 64, 65]  # tiles of 64 rows


def bounds_of(lengths, device="cpu"):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


def case(lengths, heads, width):
    """q, k and v, and a gradient of the output."""
    return values(sum(lengths), 3, heads, width), values(sum(lengths), heads, width, seed=1)


def assert_exact(lengths, heads, width, dtype, device, scale=1.0):
    qkv, upstream = case(lengths, heads, width)
    functions = (
        partial(one, cu_seqlens=bounds_of(lengths, device)) for one in (short_attention, short_attention_definition)
    )
    assert_as_exact_as_definition(*functions, [scale * qkv], [dtype], device, upstream)


@loads_its_bounds
@pytest.mark.parametrize("width", [16, 24, 32, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_definition(width, dtype, device):
    assert_exact(RAGGED, 1, width, dtype, device)


@loads_its_bounds
@pytest.mark.parametrize("lengths, heads, width", [([200], 1, 24), ([1], 3, 8), ([5, 70, 2], 1, 37), ([9], 1, 136)])
def test_other_lengths_and_widths(lengths, heads, width, device):
    assert_exact(lengths, heads, width, torch.float32, device)


@loads_its_bounds
@pytest.mark.parametrize("scale, sign", [(1e-3, 1), (8.0, 1), (8.0, -1)])
def test_scores_near_zero_and_in_the_hundreds(scale, sign, device):
    """All of one sign: keys past the sequence, which are zeros, would weigh more than fp32 holds where it is minus."""
    qkv, upstream = case([70], 1, 16)
    qkv[:, 0], qkv[:, 1] = qkv[:, 0].abs(), sign * qkv[:, 1].abs()
    inputs = [(scale * qkv).to(device).float()]
    bounds = bounds_of([70], device)
    ours, exact = (
        value_and_grads(partial(function, cu_seqlens=bounds), [tensor.to(dtype) for tensor in inputs], upstream)
        for function, dtype in ((short_attention, torch.float32), (short_attention_definition, torch.float64))
    )
    for actual, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-3, atol=1e-4 * true.abs().max().item())


@loads_its_bounds
def test_each_sequence_is_alone_and_views_are_taken(device):
    lengths = [6, 0, 67]
    qkv, upstream = (tensor.to(device).float() for tensor in case(lengths, 2, 16))
    whole = value_and_grads(partial(short_attention, cu_seqlens=bounds_of(lengths, device)), [qkv], upstream)
    apart = [
        value_and_grads(partial(short_attention, cu_seqlens=bounds_of([length], device)), [part], grad)
        for length, part, grad in zip(lengths, qkv.split(lengths), upstream.split(lengths), strict=True)
    ]
    for ours, parts in zip(whole, zip(*apart, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parts))
    wide = torch.cat([qkv, qkv], dim=-1)[..., 16:]
    view = value_and_grads(partial(short_attention, cu_seqlens=bounds_of(lengths, device)), [wide], upstream)
    assert all(torch.equal(a, b) for a, b in zip(whole, view, strict=True))


def test_no_tokens(device):
    qkv = torch.zeros(0, 3, 2, 16, device=device, requires_grad=True)
    out = short_attention(qkv, bounds_of([0, 0], device))
    assert out.shape == (0, 2, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@loads_its_bounds
def test_the_same_bits_every_time(device):
    lengths = [65, 9]
    qkv, upstream = (tensor.to(device).float() for tensor in case(lengths, 1, 16))
    call = partial(short_attention, cu_seqlens=bounds_of(lengths, device))
    runs = [value_and_grads(call, [qkv], upstream) for _ in range(20 if device == "cuda" else 2)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
def test_no_zeros_are_written_for_the_normalizers():
    qkv = torch.randn(5, 3, 1, 8).requires_grad_()
    out = short_attention(qkv, bounds_of([5])).sum()
    with Filled() as made:
        out.backward()
    assert made.count == 0


def test_fp64_goes_to_the_definition(device):
    qkv = values(5, 3, 1, 3).to(device).requires_grad_()
    assert gradcheck(partial(short_attention, cu_seqlens=bounds_of([4, 1], device)), qkv)


def test_no_number_of_tokens_or_sequences_is_part_of_a_kernel():
    """Another one would compile it again."""

    def constants(lengths):
        with recording() as recorded:
            short_attention(
                torch.zeros(sum(lengths), 3, 2, 24, requires_grad=True), bounds_of(lengths)
            ).sum().backward()
        return [
            (kernel, [one for one in given if not isinstance(one, torch.Tensor)], options)
            for kernel, given, options in recorded
        ]

    assert len(constants([1])) == 2 and constants([1]) == constants([16, 300]) == constants([7, 9, 8])


def test_what_of_a_head_is_padded():
    parts = {width: tuple(file._widths(width).values()) for width in (1, 16, 24, 64, 80, 96, 104, 128, 136)}
    assert parts == {
        1: (16, 0), 16: (16, 0), 24: (32, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 104: (128, 0), 128: (128, 0),
        136: (128, 16),
    }  # fmt: skip


def test_wrong_arguments_are_named():
    qkv, bounds = torch.zeros(4, 3, 1, 8), bounds_of([4])
    for arguments, message in (
        ((qkv[0], bounds), r"qkv_T3HE must be \(tokens, 3, heads, head width\), got \(3, 1, 8\)"),
        ((qkv[:, :2], bounds), r"qkv_T3HE must be \(tokens, 3, heads, head width\), got \(4, 2, 1, 8\)"),
        ((qkv.long(), bounds), "qkv_T3HE must be of a floating type, got torch.int64"),
        ((qkv, bounds.long()), r"cu_seqlens must be int32, \(S \+ 1,\), got torch.int64, \(2,\)"),
        ((qkv, bounds.to("meta")), "cu_seqlens must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            short_attention(*arguments)
