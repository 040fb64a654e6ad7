import math

import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels.target_loss import target_loss, target_loss_definition
from tests.kernels.accuracy import DTYPES, WIDTHS, assert_as_exact_as_definition


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
def test_value_and_gradient_match_the_formula(kind, tokens, rows, width, device):
    pred, target, indices = (tensor.to(device) for tensor in case(tokens, rows, width))
    pred.requires_grad_()
    loss = target_loss(pred, target, indices, kind)
    loss.backward()
    value, grad = naive(pred.tolist(), target.tolist(), indices.tolist(), kind)
    assert loss.dtype == torch.float64 and loss.shape == ()
    # eps, 1e-5, reaches the kernel in fp32: within 1e-12 of it.
    assert loss.item() == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(pred.grad.cpu(), torch.tensor(grad, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
def test_gradcheck(kind, device):
    pred, target, indices = (tensor.to(device) for tensor in case(5, 3, 6))
    torch.autograd.gradcheck(lambda p: target_loss(p, target, indices, kind), pred.requires_grad_(), fast_mode=True)


def test_the_target_is_a_constant(device):
    pred, target, indices = (tensor.to(device) for tensor in case(5, 3, 6))
    pred.requires_grad_(), target.requires_grad_()
    target_loss(pred, target, indices).backward()
    assert target.grad is None and pred.grad.abs().sum() > 0


def test_scale_and_shift_of_a_target_row_do_not_matter(device):
    pred, target, indices = (tensor.to(device) for tensor in case(9, 4, 50))
    expected = target_loss(pred, target, indices, eps=0.0)
    changed = target * torch.tensor([[0.1], [3.0], [40.0], [1.0]], dtype=torch.float64, device=device) - 7
    assert target_loss(pred, changed, indices, eps=0.0).item() == pytest.approx(expected.item(), rel=1e-10)
    # A constant row is normalized to zeros, not to NaN.
    flat = target_loss(pred, torch.full_like(target, 3.0), indices, "l2")
    assert flat.item() == pytest.approx((pred**2).mean().item(), rel=1e-12)


def test_default_is_smooth_l1_and_rows_may_repeat(device):
    pred, target, _ = (tensor.to(device) for tensor in case(6, 3, 8))
    repeated = torch.tensor([2, 2, 0, 2, 0, 0], dtype=torch.int32, device=device)
    rows = torch.cat([target[2:], target[2:], target[:1], target[2:], target[:1], target[:1]])
    loss = target_loss(pred, target, repeated)
    assert loss == target_loss(pred, rows, torch.arange(6, device=device), "smooth_l1")
    assert loss != target_loss(pred, target, repeated, "l2")


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_definition(kind, width, dtype, device):
    """For an upstream gradient that is a power of two, as the loss scale of fp16 training is."""
    pred, target, indices = case(6, 3, width)
    target, indices = target.to(device, dtype), indices.to(device)

    def double_where_pred_is(function):
        return lambda p: function(p, target.to(p.dtype), indices, kind)

    functions = map(double_where_pred_is, (target_loss, target_loss_definition))
    assert_as_exact_as_definition(*functions, [pred], [dtype], device, torch.tensor(1024.0))


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_another_upstream_gradient_costs_one_more_rounding(kind, dtype, device):
    pred, target, indices = (tensor.to(device) for tensor in case(6, 3, 37))
    pred, target, upstream = pred.to(dtype).requires_grad_(), target.to(dtype), torch.tensor(0.3, device=device)
    (grad,) = torch.autograd.grad(target_loss(pred, target, indices, kind), pred, upstream)
    double = pred.detach().double().requires_grad_()
    loss = target_loss_definition(double, target.double(), indices, kind)
    (exact,) = torch.autograd.grad(loss, double, upstream.double())
    # Each rounding errs by eps / 2; what fp32 errs before is far less.
    noise = 32 * torch.finfo(torch.float32).eps * exact.abs().max().item() + torch.finfo(dtype).smallest_normal * 2**-9
    torch.testing.assert_close(grad.double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=noise)


def test_the_gradient_of_many_predictions_does_not_vanish_in_fp16(device):
    """It is below what fp16 holds, until the loss scale that fp16 training has multiplies it."""
    pred, target, indices = (tensor.to(device) for tensor in case(70, 3, 960))
    pred = pred.half().requires_grad_()
    (65536 * target_loss(pred, target.half(), indices)).backward()
    exact = pred.detach().double().requires_grad_()
    (65536 * target_loss_definition(exact, target.half().double(), indices)).backward()
    torch.testing.assert_close(pred.grad.double(), exact.grad, rtol=2**-9, atol=1e-3)


def test_no_predictions_and_views(device):
    pred, target, indices = (tensor.to(device) for tensor in case(6, 3, 8))
    empty = pred[:0].clone().requires_grad_()
    loss = target_loss(empty, target, indices[:0])
    loss.backward()
    assert loss.isnan() and empty.grad.shape == (0, 8)
    flat = torch.cat([pred.flatten()[:1], pred.flatten()]).float()  # its rows start 4 bytes off
    wide = torch.cat([target, target], dim=1)[:, 8:].float()
    views = flat[1:].view(6, 8).requires_grad_(), wide, torch.cat([indices[:1], indices])[1:]
    plain = pred.float().requires_grad_(), target.float(), indices
    (grad,), (expected,) = (torch.autograd.grad(target_loss(*inputs), inputs[0]) for inputs in (views, plain))
    assert torch.equal(grad, expected)


def test_evaluation_keeps_no_gradient(device):
    pred, target, indices = (tensor.to(device) for tensor in case(5, 3, 6))
    loss = target_loss(pred, target, indices)
    assert not loss.requires_grad
    with torch.no_grad():
        assert target_loss(pred.requires_grad_(), target, indices) == loss


def test_the_same_bits_every_time(device):
    pred, target, indices = (
        tensor.to(device) for tensor in (case(300, 40, 96) if device == "cuda" else case(30, 4, 96))
    )
    pred, target = pred.float().requires_grad_(), target.float()
    runs = []
    for _ in range(20 if device == "cuda" else 2):
        loss = target_loss(pred, target, indices)
        runs.append((loss.detach(), *torch.autograd.grad(loss, pred)))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def layers_of(pred, target, count):
    """As many layers, of other scales and shifts, with their columns of the predictions; all other than the first."""
    targets = [(layer + 1) * target.roll(layer, 0) + layer * pred.mean() for layer in range(count)]
    preds = [pred * (1 + 0.5 * layer) for layer in range(count)]
    return torch.cat(preds, dim=1), targets


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("tokens, rows, width, count", [(1, 1, 1, 2), (7, 4, 19, 3), (9, 16, 32, 2), (5, 3, 16, 1)])
def test_several_layers_match_the_formula(kind, tokens, rows, width, count, device):
    """Each normalized apart, against its own columns; the mean is over all."""
    pred, target, indices = (tensor.to(device) for tensor in case(tokens, rows, width))
    pred, targets = layers_of(pred, target, count)
    loss = target_loss(pred.requires_grad_(), targets, indices, kind)
    loss.backward()
    columns = pred.detach().split(width, dim=1)
    parts = [naive(p.tolist(), t.tolist(), indices.tolist(), kind) for p, t in zip(columns, targets, strict=True)]
    assert loss.item() == pytest.approx(sum(value for value, _ in parts) / count, rel=1e-10)
    grad = torch.cat([torch.tensor(grad, dtype=torch.float64) / count for _, grad in parts], dim=1)
    torch.testing.assert_close(pred.grad.cpu(), grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("width", [37, 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_layers_are_as_exact_as_the_definition(kind, width, dtype, device):
    pred, target, indices = case(6, 3, width)
    pred, targets = layers_of(pred, target, 3)
    targets, indices = [target.to(device, dtype) for target in targets], indices.to(device)

    def double_where_pred_is(function):
        return lambda p: function(p, [target.to(p.dtype) for target in targets], indices, kind)

    functions = map(double_where_pred_is, (target_loss, target_loss_definition))
    assert_as_exact_as_definition(*functions, [pred], [dtype], device, torch.tensor(1024.0))


@pytest.mark.parametrize("kind, loss", [("smooth_l1", F.smooth_l1_loss), ("l2", F.mse_loss)])
def test_without_norm_targets_are_taken_as_they_are(kind, loss, device):
    pred, target, indices = (tensor.to(device) for tensor in case(9, 4, 37))
    pred.requires_grad_()
    ours, theirs = target_loss(pred, target, indices, kind, norm=False), loss(pred, target[indices])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    grads = [torch.autograd.grad(value, pred)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_one_layer_in_a_list_is_the_same_to_the_bit(device):
    pred, target, indices = (tensor.to(device) for tensor in case(6, 3, 40))
    inputs = pred.float().requires_grad_(), target.float()
    outcomes = []
    for targets in (inputs[1], [inputs[1]]):
        loss = target_loss(inputs[0], targets, indices)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, inputs[0])))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    "shape, others, message",
    [
        ((4, 16), [(3, 8), (3, 8), (3, 8)], r"pred_TF \(T, 3 \* D\), got .* and \(4, 16\)"),
        ((4, 16), [(3, 8), (2, 8)], r"all of as many rows"),
        ((4, 16), [(3, 8), (3, 4)], r"targets\[1\] must be as wide as targets\[0\], 8, got 4"),
        ((4, 16), [], r"targets holds no layer"),
    ],
)
def test_layers_that_do_not_fit(shape, others, message):
    with pytest.raises(ValueError, match=message):
        target_loss(torch.zeros(shape), [torch.zeros(other) for other in others], torch.zeros(4, dtype=torch.int64))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"unknown loss 'l1'; choose one of smooth_l1, l2"):
        target_loss(*case(2, 2, 2), "l1")
