import pytest
import torch

from ijepa_scale.models import attention
from ijepa_scale.models.attention import Sequences, packed_attention, packed_attention_reference

LENGTHS = [[1], [9], [1, 1, 1], [4, 4, 4], [5, 1, 9, 2], [1, 30], [17, 16, 17, 1, 3]]


def sequences_of(lengths):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return Sequences(bounds, max(lengths), sum(lengths))


def qkv_of(tokens, heads=3, width=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, 3, heads, width, generator=generator, dtype=torch.float64)).to(dtype)


def naive(qkv, lengths):
    """One query of one head at a time."""
    rows, start = [], 0
    for length in lengths:
        for query in range(start, start + length):
            heads = []
            for head in range(qkv.shape[2]):
                scores = torch.stack([qkv[query, 0, head] @ qkv[key, 1, head] for key in range(start, start + length)])
                weights = (scores / qkv.shape[3] ** 0.5).exp()
                values = qkv[start : start + length, 2, head]
                heads.append((weights[:, None] * values).sum(0) / weights.sum())
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def test_the_definition_is_softmax_attention_within_each_sequence():
    lengths = [5, 1, 9, 2]
    qkv = qkv_of(17)
    expected = naive(qkv, lengths)
    torch.testing.assert_close(packed_attention_reference(qkv, sequences_of(lengths)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads, width", [(1, 4), (3, 8)])
@pytest.mark.parametrize("path", ["packed_attention", "_grouped_attention", "_padded_attention"])
def test_value_and_gradient_match_the_definition(lengths, heads, width, path):
    sequences = sequences_of(lengths)
    upstream = torch.randn(sum(lengths), heads, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for run in (getattr(attention, path), packed_attention_reference):
        qkv = qkv_of(sum(lengths), heads, width).requires_grad_()
        out = run(qkv, sequences)
        assert out.shape == (sum(lengths), heads, width) and out.dtype == torch.float64
        results.append((out, *torch.autograd.grad(out, qkv, upstream)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [24, 32, 64, 80, 88, 104])
def test_the_heads_of_every_model(width):
    sequences = sequences_of([65, 1, 30])
    results = []
    for run in (packed_attention, packed_attention_reference):
        qkv = qkv_of(96, 2, width).requires_grad_()
        out = run(qkv, sequences)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2]], ids=str)
def test_gradcheck(lengths):
    sequences = sequences_of(lengths)
    qkv = qkv_of(sum(lengths), heads=2, width=3).requires_grad_()
    torch.autograd.gradcheck(lambda x: packed_attention(x, sequences), qkv)


def test_a_single_token_attends_to_itself():
    qkv = qkv_of(3)
    torch.testing.assert_close(packed_attention(qkv, sequences_of([1, 1, 1])), qkv[:, 2])
    torch.testing.assert_close(packed_attention(qkv, sequences_of([1, 2]))[0], qkv[0, 2])


def test_the_order_of_packing_changes_nothing():
    lengths, order = [5, 1, 9, 2], [2, 0, 3, 1]
    qkv = qkv_of(17)
    parts = qkv.split(lengths)
    out = packed_attention(qkv, sequences_of(lengths)).split(lengths)
    shuffled = packed_attention(torch.cat([parts[i] for i in order]), sequences_of([lengths[i] for i in order]))
    torch.testing.assert_close(shuffled, torch.cat([out[i] for i in order]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lengths", [[5, 1, 9, 2], [6, 6, 6]], ids=str)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_sequences_do_not_influence_one_another(lengths, changed):
    qkv = qkv_of(sum(lengths))
    before = packed_attention(qkv, sequences_of(lengths)).split(lengths)
    perturbed = list(qkv.split(lengths))
    perturbed[changed] = 1e3 * torch.ones_like(perturbed[changed]) + perturbed[changed] ** 2
    after = packed_attention(torch.cat(perturbed), sequences_of(lengths)).split(lengths)
    for i in range(len(lengths)):
        assert torch.equal(before[i], after[i]) == (i != changed)


def test_gradients_stay_within_a_sequence():
    lengths = [4, 7, 2]
    qkv = qkv_of(13).requires_grad_()
    packed_attention(qkv, sequences_of(lengths))[4:11].square().sum().backward()
    touched = qkv.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [False] * 4 + [True] * 7 + [False] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 2], [6, 6, 6]], ids=str)
def test_lower_precision_is_as_accurate_as_the_definition(dtype, lengths):
    qkv = qkv_of(sum(lengths), width=16, dtype=dtype)
    exact = packed_attention_reference(qkv.double(), sequences_of(lengths))
    out = packed_attention(qkv, sequences_of(lengths))
    assert out.dtype == dtype
    eager_error = (packed_attention_reference(qkv, sequences_of(lengths)).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * eager_error + 1e-7


def test_strided_qkv():
    lengths = [5, 1, 9, 2]
    wide = qkv_of(34)
    for sequences in (sequences_of(lengths), sequences_of([17])):
        expected = packed_attention_reference(wide[::2].contiguous(), sequences)
        torch.testing.assert_close(packed_attention(wide[::2], sequences), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_padded_layout(lengths):
    sequences = sequences_of(lengths)
    longest = max(lengths)
    rows = [s * longest + place for s, length in enumerate(lengths) for place in range(length)]
    assert sequences.count == len(lengths)
    assert sequences.equal_lengths == (len(set(lengths)) == 1)
    assert sequences.padded_rows_T.tolist() == rows
    mask = [[place < length for place in range(longest)] for length in lengths]
    assert sequences.key_mask_S11L.shape == (len(lengths), 1, 1, longest)
    assert sequences.key_mask_S11L[:, 0, 0].tolist() == mask
