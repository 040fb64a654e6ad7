import pytest
import torch

from ijepa_kernels.gather import gather_rows


def tokens_of(rows, width, dtype=torch.float64, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rows, width, count", [(1, 1, 1), (7, 5, 3), (33, 17, 64), (5, 1408, 5), (4, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_value_and_gradient_match_a_loop(rows, width, count, dtype, index_dtype):
    tokens = tokens_of(rows, width, dtype).requires_grad_()
    indices = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(1)).to(index_dtype)
    out = gather_rows(tokens, indices)
    assert out.shape == (count, width) and out.dtype == dtype
    upstream = tokens_of(count, width, dtype, seed=2)
    out.backward(upstream)
    grad = torch.zeros(rows, width, dtype=torch.float64)
    for place, row in enumerate(indices.tolist()):
        assert torch.equal(out[place], tokens[row])
        grad[row] += upstream[place].double()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(tokens.grad.double(), grad, rtol=tolerance, atol=tolerance)


def test_gradcheck_with_repeated_rows_and_strided_tokens():
    tokens = tokens_of(6, 8)[:, ::2].requires_grad_()
    indices = torch.tensor([5, 0, 0, 3, 5, 5])
    assert not tokens.is_contiguous()
    torch.autograd.gradcheck(gather_rows, (tokens, indices))


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_out_of_range_is_an_error(row):
    with pytest.raises(IndexError):
        gather_rows(tokens_of(4, 2), torch.tensor([0, row]))
