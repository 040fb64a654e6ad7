import pytest
import torch

from ijepa_kernels.gather import gather_rows, gather_rows_definition
from tests.kernels.accuracy import DTYPES, WIDTHS, assert_as_exact_as_definition, values


def indices_of(rows, count, seed=1):
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]


@pytest.mark.parametrize("rows, count", [(1, 1), (7, 3), (33, 20), (5, 5), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_value_and_gradient_match_a_loop(rows, count, dtype, index_dtype, device):
    tokens = values(rows, 17).to(device, dtype).requires_grad_()
    indices = indices_of(rows, count)
    out = gather_rows(tokens, indices.to(device, index_dtype))
    assert out.shape == (count, 17) and out.dtype == dtype
    upstream = values(count, 17, seed=2).to(device, dtype)
    out.backward(upstream)
    grad = torch.zeros(rows, 17, dtype=dtype, device=device)
    for place, row in enumerate(indices.tolist()):
        assert torch.equal(out[place], tokens[row])
        grad[row] = upstream[place]
    assert torch.equal(tokens.grad, grad)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_definition(width, dtype, device):
    rows, indices = 11, indices_of(11, 6).to(device)
    assert_as_exact_as_definition(
        lambda tokens: gather_rows(tokens, indices),
        lambda tokens: gather_rows_definition(tokens, indices),
        [values(rows, width)],
        [dtype],
        device,
        values(len(indices), width, seed=2),
    )


def test_gradcheck_with_strided_tokens(device):
    tokens = values(6, 8).to(device)[:, ::2].requires_grad_()
    indices = torch.tensor([5, 0, 3], device=device)
    assert not tokens.is_contiguous()
    torch.autograd.gradcheck(lambda tokens: gather_rows(tokens, indices), (tokens,), fast_mode=True)


def test_inputs_that_start_anywhere(device):
    """A view whose first element is not aligned to 16 bytes, and indices from the middle of a vector."""
    flat = values(1 + 9 * 16).float().to(device)
    tokens, indices = flat[1:].view(9, 16), indices_of(9, 8).to(device, torch.int32)[3:]
    assert torch.equal(gather_rows(tokens, indices), tokens[indices.long()])


def test_wrong_arguments_are_named():
    tokens, indices = values(4, 2), torch.tensor([0, 1])
    for wrong, name in (
        ((tokens[0], indices), "tokens_TD must"),
        ((tokens.long(), indices), "tokens_TD must be of a floating type"),
        ((tokens, indices.float()), "indices_K must be int32 or int64"),
        ((tokens, indices[None]), "indices_K must have 1 dimension"),
        ((tokens, indices.to("meta")), "indices_K must be on cpu"),
    ):
        with pytest.raises(ValueError, match=name):
            gather_rows(*wrong)
