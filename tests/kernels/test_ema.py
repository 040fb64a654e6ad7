import pytest
import torch

from ijepa_kernels.ema import ema_update
from tests.kernels.accuracy import INTERPRETED, values


def weights(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return values(*shape, seed=seed).to(device, dtype)


def ulp(tensor):
    """The distance from each number's magnitude to the next larger fp32 number, in float64."""
    size = tensor.abs().float()
    return (torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()).clamp(min=2**-149)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (33, 500), (2, 3, 7, 7), (0,), (4097,)])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 0.99999])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_within_an_ulp_of_float64(shape, momentum, source_dtype, device):
    ema, source = weights(*shape, device=device), weights(*shape, seed=1, dtype=source_dtype, device=device)
    exact = momentum * ema.double() + (1 - momentum) * source.double()
    larger = torch.maximum(ema.abs(), source.float().abs())
    before = source.clone()
    assert ema_update(ema, source, momentum) is ema
    assert ((ema.double() - exact).abs() <= ulp(larger)).all()
    assert torch.equal(source, before)


def test_momentum_one_and_zero_are_exact(device):
    ema, source = 1e4 * weights(1000, device=device), weights(1000, seed=1, device=device)
    assert torch.equal(ema_update(ema.clone(), source, 1.0), ema)
    assert torch.equal(ema_update(ema.clone(), source, 0.0), source)


def test_equal_weights_stay_equal(device):
    ema = weights(1000, device=device)
    assert torch.equal(ema_update(ema.clone(), ema, 0.996), ema)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_copy_is_the_average_rounded(dtype, device):
    ema, source = weights(5, 7, device=device), weights(5, 7, seed=1, device=device)
    target = weights(5, 7, seed=2, dtype=dtype, device=device)
    alone = ema_update(ema.clone(), source, 0.9)
    ema_update(ema, source, 0.9, target)
    assert torch.equal(ema, alone)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter does not round
        torch.testing.assert_close(target.float(), alone, rtol=2**-7, atol=0)
    else:
        assert torch.equal(target, alone.to(dtype))


def test_parts_of_a_buffer_that_start_anywhere(device):
    """As the shards of ranks do: nothing outside of the part is written, and it need not be aligned."""
    ema, source = weights(100, device=device), weights(100, seed=1, device=device)
    target = torch.full((100,), 7.0, dtype=torch.float16, device=device)
    expected = ema.clone()
    expected[3:90] = ema_update(ema[3:90].clone(), source[5:92], 0.9)
    ema_update(ema[3:90], source[5:92], 0.9, target[1:88])
    assert torch.equal(ema, expected) and torch.equal(target[1:88], ema[3:90].half())
    assert (target[:1] == 7).all() and (target[88:] == 7).all()


def test_small_updates_are_not_lost(device):
    """What bf16 loses: at momentum 0.9999 an update is far below bf16's resolution."""
    ema, source = torch.ones(8, device=device), torch.full((8,), 2.0, device=device)
    for _ in range(100):
        ema_update(ema, source, 0.9999)
    torch.testing.assert_close(ema, torch.full_like(ema, 2 - 0.9999**100), rtol=1e-5, atol=0)


def test_parameters_and_strided_averages():
    parameter, source = (torch.nn.Parameter(weights(3, seed=seed)) for seed in (0, 1))
    expected = 0.5 * parameter.detach() + 0.5 * source.detach()
    ema_update(parameter, source, 0.5)
    torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.is_leaf and parameter.grad_fn is None
    strided = weights(4, 6).T
    if INTERPRETED:
        with pytest.raises(ValueError, match="ema must be contiguous"):
            ema_update(strided, torch.ones(6, 4), 0.5)
    else:
        expected = 0.5 * strided + 0.5
        torch.testing.assert_close(ema_update(strided, torch.ones(6, 4), 0.5), expected)


def test_float64_is_averaged_in_float64():
    ema, source = weights(9, dtype=torch.float64), weights(9, seed=1, dtype=torch.float64)
    exact = 0.996 * ema + (1 - 0.996) * source
    torch.testing.assert_close(ema_update(ema, source, 0.996), exact, rtol=1e-14, atol=1e-15)


def test_wrong_arguments_are_named():
    ema = weights(4)
    for arguments, name in (
        ((ema.bfloat16(), ema, 0.5), "ema must be float32, got torch.bfloat16"),
        ((ema, weights(5), 0.5), r"source must be \(4,\) as ema, got \(5,\)"),
        ((ema, ema, 1.5), "momentum must lie in 0..1, got 1.5"),
        ((ema, ema, 0.5, weights(3)), "target must be"),
        ((ema, ema.to("meta"), 0.5), "source must be on cpu"),
        ((ema, ema.long(), 0.5), "source must be of a floating type"),
    ):
        with pytest.raises(ValueError, match=name):
            ema_update(*arguments)
