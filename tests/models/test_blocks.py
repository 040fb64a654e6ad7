"""A block where kernels run: the same sums in other passes, here with the operations' definitions."""

import pytest
import torch
from torch import nn

from ijepa_scale.models import blocks
from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import Block, ViTSize, recompute, run_blocks

SIZE = ViTSize(width=16, depth=3, heads=2, mlp_width=40)
SEQUENCES = Sequences(torch.tensor([0, 4, 9, 11], dtype=torch.int32), 5, 11)
ROWS = torch.tensor([10, 0, 3])


@pytest.fixture
def in_kernels(monkeypatch):
    """in_kernels(yes): whether blocks take the way of kernels from here on. It is counted how often they do."""
    taken = []
    forward = Block._forward_in_kernels
    monkeypatch.setattr(Block, "_forward_in_kernels", lambda *a, **k: (taken.append(1), forward(*a, **k))[1])

    def use(yes):
        monkeypatch.setattr(blocks, "use_kernels", lambda _: yes)
        return taken

    return use


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.ModuleList(Block(SIZE) for _ in range(SIZE.depth)).to(dtype)
    for name, parameter in layers.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.5)
    return layers, torch.randn(11, 16, dtype=dtype)


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("every", [0, 2])
def test_value_and_every_gradient_are_the_same(rows, every, in_kernels):
    layers, tokens = network()
    recompute(layers, every)
    tokens.requires_grad_()
    inputs, results = [tokens, *layers.parameters()], []
    for yes in (False, True):
        taken = in_kernels(yes)
        out = run_blocks(layers, tokens, SEQUENCES, rows)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        assert bool(taken) == yes
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [None, ROWS])
def test_without_gradients_tokens_may_be_written_over(rows, in_kernels):
    layers, tokens = network()
    in_kernels(False)
    with torch.no_grad():
        expected = run_blocks(layers, tokens.clone(), SEQUENCES, rows)
        taken, given = in_kernels(True), tokens.clone()
        out = run_blocks(layers, given, SEQUENCES, rows)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        assert len(taken) == SIZE.depth and (rows is not None or out.data_ptr() == given.data_ptr())
        kept = tokens.clone()
        layers[0](kept, SEQUENCES)  # not told that it may
        assert torch.equal(kept, tokens)
        hook = layers[1].register_forward_hook(lambda *_: None)  # it may keep what it is given
        run_blocks(layers, kept, SEQUENCES)
        hook.remove()
        assert torch.equal(kept, tokens)


def test_drop_path_and_mixed_types_go_the_other_way(in_kernels):
    layers, tokens = network(torch.float32)
    taken = in_kernels(True)
    run_blocks(layers, tokens, SEQUENCES, keep=torch.ones(SIZE.depth, 3, 2))
    run_blocks(layers.double(), tokens.double(), SEQUENCES, keep=torch.ones(SIZE.depth, 3, 2))
    layers[0].norm1.float()
    with pytest.raises(RuntimeError):  # LayerNorm's own: it has no such mixture on a CPU
        layers[0](tokens.double(), SEQUENCES)
    assert taken == []


def test_under_autocast_products_are_of_the_lower_precision(in_kernels):
    layers, tokens = network(torch.float32)
    results = []
    for yes in (False, True):
        taken = in_kernels(yes)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run_blocks(layers, tokens, SEQUENCES))
    assert len(taken) == SIZE.depth and results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    assert not torch.equal(results[1], run_blocks(layers, tokens, SEQUENCES)), "products were rounded"
