import math

import pytest
import torch

from ijepa_kernels import linear_gelu as linear_gelu_file
from ijepa_kernels.linear_gelu import linear_gelu, linear_gelu_definition
from tests.kernels.accuracy import INTERPRETED, values

HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bf16 off where hardware rounds


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that the interpreter has several programs with several tiles each, some cut off at an edge."""
    if INTERPRETED:
        sizes = {"BLOCK_T": 32, "BLOCK_K": 32, "BLOCK_D": 16, "GROUP": 2}
        monkeypatch.setattr(linear_gelu_file, "SIZES", sizes)
        monkeypatch.setattr(linear_gelu_file, "PROGRAMS", 3)


def case(tokens, width, mlp_width, dtype, device):
    shapes = ((tokens, width), (mlp_width, width), (mlp_width,))
    scales = (1.0, 2 * width**-0.5, 1.0)
    return [values(*shape, seed=seed, scale=scales[seed]).to(device, dtype) for seed, shape in enumerate(shapes)]


def test_the_definition_is_the_formula():
    x, weight, bias = case(3, 8, 16, torch.float64, "cpu")
    out = linear_gelu(x, weight, bias)
    for t in range(3):
        for k in range(16):
            y = math.fsum(a * b for a, b in zip(x[t].tolist(), weight[k].tolist(), strict=True)) + bias[k].item()
            assert out[t, k].item() == pytest.approx(y * 0.5 * (1 + math.erf(y / math.sqrt(2))), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("tokens, width, mlp_width", [(1, 8, 8), (33, 64, 16), (70, 40, 56), (129, 24, 72), (0, 8, 8)])
def test_as_exact_as_the_definition(tokens, width, mlp_width, device):
    inputs = case(tokens, width, mlp_width, HALF, device)
    exact = linear_gelu_definition(*(tensor.double() for tensor in inputs))
    fused, eager = linear_gelu(*inputs, fused=True), linear_gelu_definition(*inputs)
    assert fused.dtype == HALF and fused.shape == exact.shape
    if tokens:
        assert fused.abs().max() > 0.5
        allowed = 1.01 * (eager.double() - exact).abs().max() + 1e-6
        assert (fused.double() - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, width, mlp_width", [(32768, 1280, 5120), (1000, 384, 1536)])
def test_a_whole_layer(tokens, width, mlp_width):
    inputs = case(tokens, width, mlp_width, torch.bfloat16, "cuda")
    exact = linear_gelu_definition(*(tensor.float() for tensor in inputs))
    fused, eager = linear_gelu(*inputs, fused=True), linear_gelu_definition(*inputs)
    assert (fused.float() - exact).abs().max() <= 1.01 * (eager.float() - exact).abs().max()


def test_it_is_off_by_default_and_has_a_gradient_then(device):
    inputs = [tensor.requires_grad_() for tensor in case(5, 8, 16, HALF, device)]
    out = linear_gelu(*inputs)
    assert torch.equal(out, linear_gelu_definition(*inputs))
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.skipif(not INTERPRETED, reason="what the kernel takes")
def test_wrong_arguments_are_named():
    x, weight, bias = case(4, 8, 16, HALF, "cpu")
    for arguments, message in (
        ((x.float(), weight.float(), bias.float()), "takes x, weight and bias in bfloat16 or all in float16"),
        ((x, weight, bias.bfloat16()), "takes x, weight and bias in bfloat16 or all in float16"),
        ((x[:, :7], weight[:, :7], bias), r"widths that are multiples of 8, got \(16, 7\)"),
        ((x, weight, bias[:8]), r"bias_K must be \(16,\), got \(8,\)"),
        ((x, weight[:, :4], bias), "weight_KD must be as wide as x_TD, 8, got 4"),
        ((x, weight.clone().requires_grad_(), bias), "fused=True has no gradient; call it under torch.no_grad"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_gelu(*arguments, fused=True)
    with torch.no_grad():
        linear_gelu(x, weight.clone().requires_grad_(), bias, fused=True)
