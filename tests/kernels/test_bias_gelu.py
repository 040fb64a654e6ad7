import math

import pytest
import torch

from ijepa_kernels import bias_gelu as bias_gelu_file
from ijepa_kernels import column_sums as column_sums_file
from ijepa_kernels.bias_gelu import bias_gelu, bias_gelu_definition
from tests.kernels.accuracy import DTYPES, INTERPRETED, assert_as_exact_as_definition, values


@pytest.fixture(autouse=True)
def several_programs(monkeypatch):
    """Of few tokens, so that their sums are added up; and few for these sums, as the interpreter is slow."""
    if INTERPRETED:
        monkeypatch.setattr(bias_gelu_file, "LOOPS", 2)
        monkeypatch.setattr(column_sums_file, "COLUMNS", 512)


def case(tokens, width):
    return [values(tokens, width, scale=2.0), values(width, seed=1)], values(tokens, width, seed=2)


@pytest.mark.parametrize("tokens, width", [(1, 1), (5, 7), (37, 3)])
def test_value_and_gradients_match_the_formula(tokens, width, device):
    (x, bias), upstream = case(tokens, width)
    leaves = [tensor.to(device).requires_grad_() for tensor in (x, bias)]
    out = bias_gelu(*leaves)
    grad_x, grad_bias = (grad.cpu() for grad in torch.autograd.grad(out, leaves, upstream.to(device)))
    expected_bias = [0.0] * width
    for t in range(tokens):
        for k in range(width):
            y = x[t, k].item() + bias[k].item()
            below = 0.5 * (1 + math.erf(y / math.sqrt(2)))
            slope = below + y * math.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
            assert out[t, k].item() == pytest.approx(y * below, rel=1e-12, abs=1e-14)
            assert grad_x[t, k].item() == pytest.approx(upstream[t, k].item() * slope, rel=1e-12, abs=1e-14)
            expected_bias[k] += upstream[t, k].item() * slope
    assert grad_bias.tolist() == pytest.approx(expected_bias, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("tokens, width", [(3, 16), (70, 300), (17, 1280)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_definition(tokens, width, dtype, device):
    inputs, upstream = case(tokens, width)
    assert_as_exact_as_definition(bias_gelu, bias_gelu_definition, inputs, [dtype] * 2, device, upstream)


def test_no_tokens_views_and_a_bias_of_another_type(device):
    (x, bias), _ = case(6, 8)
    x, bias = x.to(device).half(), bias.to(device).float().requires_grad_()
    wide = torch.cat([x, x], dim=1)[:, 8:].requires_grad_()
    out = bias_gelu(wide, bias)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, bias_gelu(x, bias.half()), rtol=2e-3, atol=2e-3)
    grads = torch.autograd.grad(out.sum(), [wide, bias])
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float32]
    (none,) = torch.autograd.grad(bias_gelu(x[:0], bias).sum(), bias)
    assert (none == 0).all()


def test_the_same_bits_every_time(device):
    inputs, upstream = case(300, 96)
    leaves = [tensor.to(device).float().requires_grad_() for tensor in inputs]
    runs = []
    for _ in range(20 if device == "cuda" else 2):
        out = bias_gelu(*leaves)
        runs.append((out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out))))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_wrong_arguments_are_named():
    x = torch.zeros(3, 4)
    for arguments, message in (
        ((x[0], x[0]), r"x_TK must be \(rows, width\), got \(4,\)"),
        ((x, torch.zeros(5)), r"bias_K must be \(4,\), of a floating type and on cpu, got \(5,\)"),
        ((x, torch.zeros(4).long()), r"bias_K must be .* got \(4,\), torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            bias_gelu(*arguments)
