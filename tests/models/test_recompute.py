"""What packed blocks keep for the backward, counted byte by byte, with and without activation checkpointing."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ijepa_kernels.dispatch import use_kernels
from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import Block, ViTSize, bytes_kept, count_recomputed, recompute, run_blocks

WIDTH, MLP, HEADS, DEPTH, TOKENS = 64, 256, 2, 5, 30
SIZE = ViTSize(width=WIDTH, depth=DEPTH, heads=HEADS, mlp_width=MLP)
SEQUENCES = Sequences(torch.tensor([0, 10, 20, 30], dtype=torch.int32), 10, TOKENS)


class Storages(TorchDispatchMode):
    """Every storage made inside, as long as something keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage)
        return made

    def bytes_kept(self, besides: list[torch.Tensor]) -> int:
        own = {tensor.untyped_storage()._cdata for tensor in besides}
        return sum(
            torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes()
            for key, ref in self.alive.items()
            if key not in own and not ref.expired()
        )


def blocks_of(every: int, dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(SIZE) for _ in range(DEPTH)).to(dtype)
    recompute(blocks, every)
    return blocks


def measured(every: int, dtype: torch.dtype) -> int:
    blocks = blocks_of(every, dtype)
    tokens = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    with Storages() as storages:
        out = run_blocks(blocks, tokens, SEQUENCES)
    return storages.bytes_kept([*blocks.parameters(), tokens, out])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_bytes_kept_for_the_backward(every, dtype):
    """All but the last block's output, which is the caller's. Kernels keep both LayerNorms' statistics in fp32."""
    expected = TOKENS * (bytes_kept(SIZE, every, dtype.itemsize) - WIDTH * dtype.itemsize)
    if use_kernels(torch.empty(0)):
        expected += TOKENS * (DEPTH - count_recomputed(DEPTH, every)) * 4 * (4 - dtype.itemsize)
    assert measured(every, dtype) == expected


def gradients(every: int) -> list[torch.Tensor]:
    blocks = blocks_of(every, torch.float32)
    tokens = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = run_blocks(blocks, tokens, SEQUENCES, torch.tensor([3, 12, 29]))
    assert out.shape == (3, WIDTH)
    out.square().sum().backward()
    return [tokens.grad, *(parameter.grad for parameter in blocks.parameters())]


@pytest.mark.parametrize("every", [1, 2])
def test_gradients_are_the_same(every):
    for found, expected in zip(gradients(every), gradients(0), strict=True):
        assert torch.equal(found, expected)


def test_nothing_is_computed_twice_without_gradients():
    blocks = blocks_of(1, torch.float32)
    calls = []
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        run_blocks(blocks, torch.randn(TOKENS, WIDTH), SEQUENCES)
    assert len(calls) == DEPTH
