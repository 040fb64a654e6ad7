import pytest
import torch

from ijepa_kernels.assemble import assemble


def case(context_rows, rows, width, num_patches, images=3, seed=0):
    """Inputs in float64; the first three are what gradients flow to."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(context_rows, width, generator=generator, dtype=torch.float64),
        torch.randn(width, generator=generator, dtype=torch.float64),
        torch.randn(num_patches, width, generator=generator, dtype=torch.float64),
        torch.randint(-1, context_rows, (rows,), generator=generator),
        torch.randint(images * num_patches, (rows,), generator=generator),
    )


def naive(context, mask_token, pos_embed, source, indices):
    rows = []
    for place in range(len(source)):
        token = mask_token if int(source[place]) == -1 else context[int(source[place])]
        rows.append(token + pos_embed[int(indices[place]) % len(pos_embed)])
    return torch.stack(rows)


SHAPES = [(1, 1, 1, 1), (4, 9, 6, 5), (11, 40, 17, 35), (2, 3, 384, 196)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_value_and_gradient_match_a_loop(shape, index_dtype):
    *inputs, source, indices = case(*shape)
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    loops = [tensor.clone().requires_grad_() for tensor in inputs]
    actual = assemble(*ours, source.to(index_dtype), indices.to(index_dtype))
    expected = naive(*loops, source, indices)
    assert torch.equal(actual, expected)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(actual, ours, upstream)
    expected_grads = torch.autograd.grad(expected, loops, upstream, materialize_grads=True)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_gradcheck():
    *inputs, source, indices = case(4, 9, 3, 5)
    assert (source == -1).any() and (source >= 0).any()
    torch.autograd.gradcheck(
        lambda *tensors: assemble(*tensors, source, indices), [tensor.requires_grad_() for tensor in inputs]
    )


@pytest.mark.parametrize("only_masks", [True, False])
def test_only_mask_tokens_and_only_context(only_masks):
    context, mask_token, pos_embed, source, indices = case(4, 9, 6, 5)
    source = torch.full_like(source, -1) if only_masks else source.clamp(min=0)
    context.requires_grad_(), mask_token.requires_grad_()
    out = assemble(context, mask_token, pos_embed, source, indices)
    out.sum().backward()
    assert torch.equal(out, naive(context, mask_token, pos_embed, source, indices))
    assert (context.grad.count_nonzero() == 0) == only_masks
    assert (mask_token.grad.count_nonzero() == 0) == (not only_masks)


def test_bf16_context_decides_the_dtype():
    """fp32 position embeddings and mask token meet bf16 tokens: the error is that of a few bf16 roundings."""
    *inputs, source, indices = case(11, 40, 17, 35)
    context, mask_token, pos_embed = (tensor.float() for tensor in inputs)
    actual = assemble(context.bfloat16(), mask_token, pos_embed, source, indices)
    assert actual.dtype == torch.bfloat16
    exact = naive(*(tensor.bfloat16().double() for tensor in inputs), source, indices)
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=2**-8)
