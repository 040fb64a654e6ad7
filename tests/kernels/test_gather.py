import pytest
import torch

from ijepa_kernels.gather import gather_rows, gather_rows_definition
from tests.kernels.accuracy import (
    DTYPES,
    INTERPRETED,
    WIDTHS,
    assert_as_exact_as_definition,
    assert_rounded_once,
    loads_its_bounds,
    values,
)


def indices_of(rows, count, unique=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randperm(rows, generator=generator)[:count]
        if unique
        else torch.randint(rows, (count,), generator=generator)
    )


SHAPES = [(1, 1), (7, 3), (33, 64), (5, 5), (4, 0)]


@loads_its_bounds
@pytest.mark.parametrize("rows, count", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_value_and_gradient_match_a_loop(rows, count, dtype, index_dtype, device):
    tokens = values(rows, 17).to(device, dtype).requires_grad_()
    indices = indices_of(rows, count)
    out = gather_rows(tokens, indices.to(device, index_dtype))
    assert out.shape == (count, 17) and out.dtype == dtype
    upstream = values(count, 17, seed=2).to(device, dtype)
    out.backward(upstream)
    grad = torch.zeros(rows, 17, dtype=torch.float64, device=device)
    for place, row in enumerate(indices.tolist()):
        assert torch.equal(out[place], tokens[row])
        grad[row] += upstream[place].double()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(tokens.grad.double(), grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unique", [True, pytest.param(False, marks=loads_its_bounds)])
@pytest.mark.parametrize("with_pos", [True, False])
def test_as_exact_as_the_definition(width, dtype, unique, with_pos, device):
    rows = 11
    indices = indices_of(rows, 6, unique) if unique else torch.tensor([3, 3, 9, 0, 3, 10, 9, 0])
    indices, pos = indices.to(device), values(4, width, seed=3).to(device, torch.float32) if with_pos else None
    assert_as_exact_as_definition(
        lambda tokens: gather_rows(tokens, indices, pos_embed_ND=pos, unique=unique),
        lambda tokens: gather_rows_definition(tokens, indices, pos),
        [values(rows, width)],
        [dtype],
        device,
        values(len(indices), width, seed=2),
    )


@loads_its_bounds
def test_a_row_wanted_500_times_is_added_up_in_fp32(device):
    """And rounded once; in fp16 the sum, near 400, would err by up to a quarter at each of the last 250 additions."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the definition adds in fp16")
    tokens, indices = torch.zeros(2, 24, dtype=torch.float16, device=device).requires_grad_(), torch.ones(500).long()
    upstream = values(500, 24).abs().half()
    (grad,) = torch.autograd.grad(gather_rows(tokens, indices.to(device)), tokens, upstream.to(device))
    assert not grad[0].any()
    assert_rounded_once(grad[1].cpu(), upstream.double().sum(dim=0))


@pytest.mark.parametrize("unique", [True, pytest.param(False, marks=loads_its_bounds)])
def test_gradcheck_with_strided_tokens(unique, device):
    tokens = values(6, 8).to(device)[:, ::2].requires_grad_()
    indices = torch.tensor([5, 0, 3] if unique else [5, 0, 0, 3, 5, 5], device=device)
    assert not tokens.is_contiguous()
    torch.autograd.gradcheck(lambda tokens: gather_rows(tokens, indices, unique=unique), (tokens,), fast_mode=True)


def test_inputs_that_start_anywhere(device):
    """A view whose first element is not aligned to 16 bytes, and indices from the middle of a vector."""
    flat = values(1 + 9 * 16).float().to(device)
    tokens, indices = flat[1:].view(9, 16), indices_of(9, 8).to(device, torch.int32)[3:]
    assert torch.equal(gather_rows(tokens, indices), tokens[indices.long()])


def test_tokens_of_whole_images_and_repeated_unique_indices(device):
    images, indices = values(2, 5, 16).to(device), torch.tensor([9, 0, 4], device=device)
    assert torch.equal(gather_rows(images, indices), images.flatten(0, 1)[indices])


@loads_its_bounds
def test_the_same_bits_every_time(device):
    tokens, indices = values(40, 96).float().to(device).requires_grad_(), indices_of(40, 300).to(device)
    upstream = values(300, 96, seed=2).float().to(device)
    grads = [
        torch.autograd.grad(gather_rows(tokens, indices), tokens, upstream)[0]
        for _ in range(20 if device == "cuda" else 2)
    ]
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_wrong_arguments_are_named():
    tokens, indices = values(4, 2), torch.tensor([0, 1])
    for wrong, name in (
        ((tokens[0], indices), "tokens_TD must be"),
        ((tokens.long(), indices), "tokens_TD must be of a floating type"),
        ((tokens, indices.float()), "indices_K must be int32 or int64"),
        ((tokens, indices[None]), "indices_K must have 1 dimension"),
        ((tokens, indices.to("meta")), "indices_K must be on cpu"),
    ):
        with pytest.raises(ValueError, match=name):
            gather_rows(*wrong)
    with pytest.raises(ValueError, match="pos_embed_ND must be as wide as tokens_TD, 2, got 3"):
        gather_rows(tokens, indices, pos_embed_ND=values(2, 3))
