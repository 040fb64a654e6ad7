import pytest
import torch

from ijepa_kernels.assemble import assemble, assemble_definition
from tests.kernels.accuracy import DTYPES, WIDTHS, assert_as_exact_as_definition, assert_rounded_once, values


def indices_of(tokens, copies, mask_tokens, num_patches, images=3, seed=0):
    """Every token `copies` times and the mask tokens, in any order."""
    generator = torch.Generator().manual_seed(seed)
    count = tokens * copies + mask_tokens
    rows = torch.randperm(count, generator=generator)
    source = torch.full((count,), -1)
    held = rows[: tokens * copies].view(tokens, copies)
    source[held.flatten()] = torch.arange(tokens).repeat_interleave(copies)
    return {
        "source_R": source,
        "indices_R": torch.randint(images * num_patches, (count,), generator=generator),
        "copies_TM": held,
        "mask_rows_K": rows[tokens * copies :],
    }


def inputs_of(tokens, width):
    return values(tokens, width), values(width, seed=1)


def naive(context, mask_token, pos_embed, indices):
    rows = []
    for source, index in zip(indices["source_R"].tolist(), indices["indices_R"].tolist(), strict=True):
        rows.append((mask_token if source == -1 else context[source]) + pos_embed[index % len(pos_embed)])
    return torch.stack(rows)


def moved(indices, device, dtype=torch.int64):
    return {name: tensor.to(device, dtype) for name, tensor in indices.items()}


SHAPES = [(1, 1, 1, 1), (4, 2, 3, 5), (11, 4, 17, 35), (2, 3, 300, 196)]  # tokens, copies, mask tokens, patches


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_value_and_gradient_match_a_loop(shape, index_dtype, device):
    indices, pos_embed = indices_of(*shape), values(shape[3], 19, seed=2)
    ours = [tensor.to(device).requires_grad_() for tensor in inputs_of(shape[0], 19)]
    loops = [tensor.requires_grad_() for tensor in inputs_of(shape[0], 19)]
    actual = assemble(*ours, pos_embed.to(device), **moved(indices, device, index_dtype))
    expected = naive(*loops, pos_embed, indices)
    assert torch.equal(actual.cpu(), expected)
    upstream = values(*actual.shape, seed=3)
    grads = torch.autograd.grad(actual, ours, upstream.to(device))
    expected_grads = torch.autograd.grad(expected, loops, upstream, materialize_grads=True)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_definition(width, dtype, device):
    indices = moved(indices_of(5, 4, 9, 6), device, torch.int32)
    pos = values(6, width, seed=2).to(device, torch.float32)  # a buffer, in fp32 whatever the model's dtype
    assert_as_exact_as_definition(
        lambda context, mask_token: assemble(context, mask_token, pos, **indices),
        lambda context, mask_token: assemble_definition(
            context, mask_token, pos, indices["source_R"], indices["indices_R"]
        ),
        inputs_of(5, width),
        [dtype, dtype],
        device,
        values(29, width, seed=3),
    )


def test_the_gradient_of_many_mask_tokens_is_rounded_once(device):
    """That of 600, which more than one program adds up."""
    indices, pos = moved(indices_of(2, 2, 600, 5), device), torch.zeros(5, 48, device=device)
    context, mask_token = (tensor.to(device).half().requires_grad_() for tensor in inputs_of(2, 48))
    upstream = values(604, 48, seed=3).abs().half().to(device)
    (grad,) = torch.autograd.grad(assemble(context, mask_token, pos, **indices), mask_token, upstream)
    exact = upstream.double()[indices["mask_rows_K"]].sum(dim=0)
    assert_rounded_once(grad, exact)


def test_gradcheck(device):
    indices, pos = moved(indices_of(4, 2, 3, 5), device), values(5, 3, seed=2).to(device)
    inputs = [tensor.to(device).requires_grad_() for tensor in inputs_of(4, 3)]
    torch.autograd.gradcheck(lambda *tensors: assemble(*tensors, pos, **indices), inputs, fast_mode=True)


@pytest.mark.parametrize("tokens, mask_tokens", [(0, 9), (5, 0), (0, 0)])
def test_no_context_and_no_mask_tokens(tokens, mask_tokens, device):
    indices, pos = indices_of(tokens, 2, mask_tokens, 6), values(6, 7, seed=2)
    context, mask_token = (tensor.to(device).requires_grad_() for tensor in inputs_of(tokens, 7))
    out = assemble(context, mask_token, pos.to(device), **moved(indices, device))
    out.sum().backward()
    assert out.shape == (2 * tokens + mask_tokens, 7)
    if tokens:
        assert torch.equal(context.grad.cpu(), torch.full((tokens, 7), 2.0, dtype=torch.float64))
    assert torch.equal(mask_token.grad.cpu(), torch.full((7,), float(mask_tokens), dtype=torch.float64))


def test_views_of_larger_tensors(device):
    indices, pos = moved(indices_of(4, 2, 3, 5), device, torch.int32), values(5, 16, seed=2).float().to(device)
    context, mask_token = (tensor.float().to(device) for tensor in inputs_of(4, 16))
    expected = assemble(context, mask_token, pos, **indices)
    strided = torch.stack([context, context], dim=1)[:, 1]
    shifted = torch.cat([mask_token[:1], mask_token])[1:]  # starts 4 bytes off
    parts = {name: torch.cat([tensor[:1], tensor])[1:] for name, tensor in indices.items()}
    assert not strided.is_contiguous() and torch.equal(assemble(strided, shifted, pos, **parts), expected)


def test_frozen_inputs_get_no_gradient(device):
    indices, pos = moved(indices_of(4, 2, 3, 5), device), values(5, 3, seed=2).to(device).requires_grad_()
    context, mask_token = (tensor.to(device) for tensor in inputs_of(4, 3))
    assemble(context, mask_token.requires_grad_(), pos, **indices).sum().backward()
    assert context.grad is None and pos.grad is None and (mask_token.grad == 3).all()


def test_the_same_bits_every_time(device):
    indices, pos = moved(indices_of(20, 4, 700, 49), device), values(49, 96, seed=2).float().to(device)
    inputs = [tensor.float().to(device).requires_grad_() for tensor in inputs_of(20, 96)]
    upstream = values(780, 96, seed=3).float().to(device)
    first, *others = (
        torch.autograd.grad(assemble(*inputs, pos, **indices), inputs, upstream)
        for _ in range(20 if device == "cuda" else 2)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_wrong_arguments_are_named():
    indices, pos = indices_of(4, 2, 3, 5), values(5, 3, seed=2)
    context, mask_token = inputs_of(4, 3)
    for change, name in (
        ({"copies_TM": indices["copies_TM"][1:]}, "copies_TM must have a row for each of 4 tokens"),
        ({"mask_rows_K": indices["mask_rows_K"][1:]}, "must name 11 rows between them, got 8 and 2"),
        ({"indices_R": indices["indices_R"][1:]}, r"indices_R must be \(11,\), got \(10,\)"),
        ({"source_R": indices["source_R"].float()}, "source_R must be int32 or int64"),
    ):
        with pytest.raises(ValueError, match=name):
            assemble(context, mask_token, pos, **{**indices, **change})
    with pytest.raises(ValueError, match="mask_token_P must be as wide as context_TP, 3, got 4"):
        assemble(context, values(4), pos, **indices)
