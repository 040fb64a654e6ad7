import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels import column_sums as column_sums_file
from ijepa_kernels import norm_residual as norm_residual_file
from ijepa_kernels.column_sums import column_sums, column_sums_definition
from ijepa_kernels.norm_residual import norm_residual, norm_residual_definition
from tests.kernels.accuracy import DTYPES, INTERPRETED, WIDTHS, Filled, assert_as_exact_as_definition, values

EPS = 1e-6


@pytest.fixture(autouse=True)
def several_programs(monkeypatch):
    """Of few tokens, so that their sums are added up; and few for these sums, as the interpreter is slow."""
    if INTERPRETED:
        monkeypatch.setattr(norm_residual_file, "LOOPS", 2)
        monkeypatch.setattr(column_sums_file, "COLUMNS", 512)


def case(tokens, width):
    """Tokens far from normalized, weight, bias and shift; and gradients of both outputs, one after the other."""
    vectors = [values(width, seed=seed, shift=1.0 if seed == 1 else 0.0) for seed in (1, 2, 3)]
    return [values(tokens, width, scale=3.0, shift=1.5), *vectors], values(2 * tokens, width, seed=4)


def both(function):
    return lambda *inputs: torch.cat(function(*inputs, EPS))


@pytest.mark.parametrize("tokens, width", [(1, 2), (7, 16), (150, 37)])
def test_value_and_gradients_match_the_formula(tokens, width, device):
    inputs, upstream = case(tokens, width)
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
    x, weight, bias, shift = leaves
    mean = x.mean(1, keepdim=True)
    plain = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + EPS).sqrt()
    exact = torch.cat([plain * weight + bias, x + shift])
    actual = both(norm_residual)(*leaves)
    # eps reaches the kernel in fp32.
    torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)
    grads, exact_grads = (torch.autograd.grad(out, leaves, upstream.to(device)) for out in (actual, exact))
    for grad, true in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tokens, width", [(3, width) for width in WIDTHS[1:]] + [(5, 1280), (161, 96)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_definition(tokens, width, dtype, device):
    inputs, upstream = case(tokens, width)
    functions = (both(norm_residual), both(norm_residual_definition))
    assert_as_exact_as_definition(*functions, inputs, [dtype] * 4, device, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_the_tokens_where_no_gradient_is_kept(dtype, device):
    inputs, _ = case(70, 48)
    x, *vectors = (tensor.to(device, dtype) for tensor in inputs)
    apart, before = norm_residual(x, *vectors, EPS), x.clone()
    assert torch.equal(x, before)
    with torch.no_grad():
        normalized, total = norm_residual(x, *vectors, EPS, overwrite=True)
    assert total.data_ptr() == x.data_ptr()
    # Another kernel is compiled for it, whose sums a GPU may take in another order.
    torch.testing.assert_close(normalized, apart[0])
    assert torch.equal(x, apart[1])
    x.copy_(before).requires_grad_()
    _, total = norm_residual(x, *vectors, EPS, overwrite=True)
    assert torch.equal(x, before) and torch.equal(total, apart[1]), "a gradient is kept: nothing is overwritten"


def test_one_output_alone_no_tokens_and_views(device):
    inputs, _ = case(6, 8)
    x, *vectors = (tensor.to(device).float().requires_grad_() for tensor in inputs)
    leaves = [x, *vectors]
    for place in (0, 1):
        losses = (
            function(*leaves, EPS)[place].square().sum() for function in (norm_residual, norm_residual_definition)
        )
        grads, expected = (torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in losses)
        for grad, true in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-5)
    none = torch.autograd.grad(torch.cat(norm_residual(x[:0], *vectors, EPS)).sum(), leaves)
    assert all((grad == 0).all() for grad in none)
    wide = torch.cat([x, x], dim=1).detach()[:, 8:]
    outputs = zip(norm_residual(wide, *vectors, EPS), norm_residual(x, *vectors, EPS), strict=True)
    assert all(torch.equal(a, b) for a, b in outputs)


def test_the_same_bits_every_time(device):
    inputs, upstream = case(300, 96)
    leaves = [tensor.to(device).float().requires_grad_() for tensor in inputs]
    runs = []
    for _ in range(20 if device == "cuda" else 2):
        out = both(norm_residual)(*leaves)
        runs.append((out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out))))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
def test_no_zeros_are_written_for_the_statistics():
    leaves = [tensor.requires_grad_() for tensor in case(3, 16)[0]]
    out = both(norm_residual)(*leaves).sum()
    with Filled() as made:
        out.backward()
    assert made.count == 0


def test_the_sum_may_be_written_over_by_a_product(device):
    """As a block does: what the backward needs is not what is written over."""
    inputs, _ = case(9, 16)
    x, weight, bias, shift = (tensor.to(device).requires_grad_() for tensor in inputs)
    matrix = values(16, 16, seed=7).to(device).requires_grad_()
    leaves = [x, weight, bias, shift, matrix]
    normalized, total = norm_residual(x, weight, bias, shift, EPS)
    out = total.addmm_(normalized, matrix)
    expected = x + shift + F.layer_norm(x, (16,), weight, bias, EPS) @ matrix
    for grad, true in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)), strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not INTERPRETED, reason="the kernel alone")
@pytest.mark.parametrize("programs, width", [(0, 5), (1, 1), (65, 33), (200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_column_sums(programs, width, dtype):
    sums = values(3, programs, width).to(dtype)
    torch.testing.assert_close(column_sums(sums, dtype), column_sums_definition(sums, dtype))


def test_wrong_arguments_are_named():
    x, one = torch.zeros(3, 4), torch.zeros(4)
    for arguments, message in (
        ((one, one, one, one), r"tokens_TD must be \(rows, width\), got \(4,\)"),
        ((x, torch.zeros(5), one, one), r"weight_D must be \(4,\), got \(5,\)"),
        (
            (x, one, one.half(), one),
            "bias_D must be of a floating type, that of weight_D, torch.float32, got torch.float16",
        ),
        ((x, one, one, one.to("meta")), "shift_D must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_residual(*arguments, EPS)
