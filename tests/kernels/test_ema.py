import pytest
import torch

from ijepa_kernels.ema import ema_update


def weights(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (33, 1408), (2, 3, 7, 7), (0,)])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 0.99999])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_matches_the_formula_in_float64(shape, momentum, source_dtype):
    ema, source = weights(*shape), weights(*shape, seed=1, dtype=source_dtype)
    exact = momentum * ema.double() + (1 - momentum) * source.double()
    before = source.clone()
    assert ema_update(ema, source, momentum) is ema
    torch.testing.assert_close(ema.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(source, before)


def test_momentum_one_and_zero_are_exact():
    ema, source = weights(1000), weights(1000, seed=1)
    assert torch.equal(ema_update(ema.clone(), source, 1.0), ema)
    assert torch.equal(ema_update(ema.clone(), source, 0.0), source)


def test_equal_weights_stay_equal():
    ema = weights(1000)
    assert torch.equal(ema_update(ema.clone(), ema, 0.996), ema)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_is_the_average_rounded(dtype):
    ema, source, target = weights(5, 7), weights(5, 7, seed=1), weights(5, 7, seed=2, dtype=dtype)
    alone = ema_update(ema.clone(), source, 0.9)
    ema_update(ema, source, 0.9, target)
    assert torch.equal(ema, alone) and torch.equal(target, alone.to(dtype))


def test_small_updates_add_up_although_the_copy_is_bf16():
    """A thousand updates, each below bf16's resolution: the copy follows only because the average is fp32."""
    ema, target = torch.ones(16), torch.ones(16, dtype=torch.bfloat16)
    source = torch.full((16,), 1.5, dtype=torch.bfloat16)
    for _ in range(1000):
        ema_update(ema, source, 0.9995, target)
    expected = 1.5 - 0.5 * 0.9995**1000
    torch.testing.assert_close(ema, torch.full((16,), expected), rtol=1e-4, atol=0)
    assert torch.equal(target, ema.bfloat16()) and target[0] > 1.15


def test_works_on_views_and_on_parameters():
    flat, other = weights(60), weights(60, seed=1)
    expected = flat.clone()
    expected[10:20] = 0.25 * expected[10:20] + 0.75 * other[10:20]
    ema_update(flat[10:20], other[10:20], 0.25)
    torch.testing.assert_close(flat, expected)
    assert torch.equal(flat[:10], expected[:10]) and torch.equal(flat[20:], expected[20:])
    strided = weights(4, 6)
    transposed = 0.5 * strided.T + 0.5
    ema_update(strided.T, torch.ones(6, 4), 0.5)
    torch.testing.assert_close(strided.T, transposed)
    parameter = torch.nn.Parameter(weights(3))
    source = torch.nn.Parameter(weights(3, seed=1))
    ema_update(parameter, source, 0.5)
    assert parameter.is_leaf and parameter.grad_fn is None


def test_float64_is_averaged_in_float64():
    ema, source = weights(9, dtype=torch.float64), weights(9, seed=1, dtype=torch.float64)
    exact = 0.996 * ema + (1 - 0.996) * source
    torch.testing.assert_close(ema_update(ema, source, 0.996), exact, rtol=1e-14, atol=1e-15)
