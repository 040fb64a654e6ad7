import pytest
import torch

from benchmarks.cases import CASES, case_of, num_bytes, tokens
from ijepa_kernels.target_loss import target_loss, target_loss_definition

LAYERS = 4  # loss.target_layers=every_8 of vith14
PROVIDERS = {
    "ours": target_loss,
    "definition": target_loss_definition,
    "compiled": torch.compile(target_loss_definition, dynamic=False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_loss_and_gradient(case, provider, row):
    """Bytes: predictions and targets in, gradients out, each once."""
    case = case_of(*case)
    indices = case.masks.target_index_T
    pred = tokens(len(indices), case.width).requires_grad_()
    target = tokens(len(case.masks.target_patches_U), case.width)

    def run():
        return torch.autograd.grad(PROVIDERS[provider](pred, target, indices), pred)

    moved = num_bytes(pred, target, indices, pred)
    row(run, op="target_loss, forward and backward", shape=case.label, provider=provider, bytes_moved=moved)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_several_layers(case, provider, row):
    case = case_of(*case)
    indices = case.masks.target_index_T
    pred = tokens(len(indices), LAYERS * case.width).requires_grad_()
    targets = [tokens(len(case.masks.target_patches_U), case.width) for _ in range(LAYERS)]

    def run():
        return torch.autograd.grad(PROVIDERS[provider](pred, targets, indices), pred)

    moved = num_bytes(pred, *targets, indices, pred)
    op = f"target_loss of {LAYERS} layers, forward and backward"
    row(run, op=op, shape=case.label, provider=provider, bytes_moved=moved)


@pytest.mark.parametrize("case", CASES)
def test_one_pass(case, row):
    """Loss and gradient as the forward leaves them: the backward of ours only multiplies by what comes from above."""
    case = case_of(*case)
    indices = case.masks.target_index_T
    pred = tokens(len(indices), case.width).requires_grad_()
    target = tokens(len(case.masks.target_patches_U), case.width)
    moved = num_bytes(pred, target, indices, pred)
    row(
        lambda: target_loss(pred, target, indices),
        op="target_loss, forward with gradient",
        shape=case.label,
        provider="ours",
        bytes_moved=moved,
    )
