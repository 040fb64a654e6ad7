import math

import pytest
import torch

from ijepa_kernels.target_loss import target_loss


def case(tokens, rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Predictions spread so that both branches of the smooth-L1 are met; targets far from normalized.
    pred = 2 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    target = 3 + 5 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return pred, target, torch.randint(rows, (tokens,), generator=generator)


def naive(pred, target, indices, kind, eps=1e-5):
    """Value and gradient, one number at a time in Python floats."""
    total, grad = 0.0, []
    count = len(pred) * len(pred[0])
    for row, index in zip(pred, indices, strict=True):
        values = target[index]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        grad.append([])
        for p, value in zip(row, values, strict=True):
            d = p - (value - mean) / math.sqrt(variance + eps)
            if kind == "l2":
                total, slope = total + d * d, 2 * d
            elif abs(d) < 1:
                total, slope = total + 0.5 * d * d, d
            else:
                total, slope = total + abs(d) - 0.5, math.copysign(1.0, d)
            grad[-1].append(slope / count)
    return total / count, grad


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("tokens, rows, width", [(1, 1, 1), (1, 3, 2), (7, 4, 19), (33, 16, 32)])
def test_value_and_gradient_match_the_formula(kind, tokens, rows, width):
    pred, target, indices = case(tokens, rows, width)
    pred.requires_grad_()
    loss = target_loss(pred, target, indices, kind)
    loss.backward()
    value, grad = naive(pred.tolist(), target.tolist(), indices.tolist(), kind)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(pred.grad, torch.tensor(grad, dtype=torch.float64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
def test_gradcheck(kind):
    pred, target, indices = case(5, 3, 6)
    torch.autograd.gradcheck(lambda p: target_loss(p, target, indices, kind), pred.requires_grad_())


def test_the_target_is_a_constant():
    pred, target, indices = case(5, 3, 6)
    pred.requires_grad_(), target.requires_grad_()
    target_loss(pred, target, indices).backward()
    assert target.grad is None and pred.grad.abs().sum() > 0


def test_scale_and_shift_of_a_target_row_do_not_matter():
    pred, target, indices = case(9, 4, 50)
    expected = target_loss(pred, target, indices, eps=0.0)
    changed = target * torch.tensor([[0.1], [3.0], [40.0], [1.0]], dtype=torch.float64) - 7
    assert target_loss(pred, changed, indices, eps=0.0).item() == pytest.approx(expected.item(), rel=1e-10)
    # A constant row is normalized to zeros, not to NaN.
    flat = target_loss(pred, torch.full_like(target, 3.0), indices, "l2")
    assert flat.item() == pytest.approx((pred**2).mean().item(), rel=1e-12)


def test_default_is_smooth_l1_and_rows_may_repeat():
    pred, target, _ = case(6, 3, 8)
    repeated = torch.tensor([2, 2, 0, 2, 0, 0], dtype=torch.int32)
    rows = torch.cat([target[2:], target[2:], target[:1], target[2:], target[:1], target[:1]])
    loss = target_loss(pred, target, repeated)
    assert loss == target_loss(pred, rows, torch.arange(6), "smooth_l1")
    assert loss != target_loss(pred, target, repeated, "l2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_computes_in_fp32(dtype):
    pred, target, indices = case(64, 20, 192)
    pred, target = pred.to(dtype).requires_grad_(), target.to(dtype)
    loss = target_loss(pred, target, indices)
    loss.backward()
    assert loss.dtype == torch.float32 and pred.grad.dtype == dtype
    exact = pred.detach().double().requires_grad_()
    exact_loss = target_loss(exact, target.double(), indices)
    exact_loss.backward()
    # The inputs are the same numbers, so only fp32 arithmetic and the rounding of the gradient remain.
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    torch.testing.assert_close(
        pred.grad.double(), exact.grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-4, atol=1e-8
    )


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"unknown loss 'l1'; choose one of smooth_l1, l2"):
        target_loss(*case(2, 2, 2), "l1")
