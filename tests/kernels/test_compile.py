"""The operations, and a module with one, under torch.compile: the kernels are part of the graph, without breaks."""

import pytest
import torch
import torch._dynamo.testing

from ijepa_kernels.assemble import assemble
from ijepa_kernels.gather import gather_rows
from ijepa_kernels.patchify import patchify
from ijepa_kernels.short_attention import short_attention
from ijepa_kernels.target_loss import target_loss
from ijepa_scale.models.vit import PatchEmbed
from tests.kernels.accuracy import INTERPRETED, values
from tests.kernels.test_assemble import indices_of, moved

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be traced")


def same_compiled(function, *inputs):
    """Value and gradients are those without torch.compile; on a CPU it only traces."""
    device = inputs[0].device.type
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for run in (function, compiled):
        out = run(*inputs)
        results.append([out.detach(), *(torch.autograd.grad(out.sum(), leaves) if leaves else [])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def tokens(rows, width, device, seed=0):
    return values(rows, width, seed=seed).float().to(device).requires_grad_()


def test_gather(device):
    indices = torch.tensor([3, 0, 2], device=device)
    same_compiled(lambda rows: gather_rows(rows, indices), tokens(5, 48, device))


def test_assemble(device):
    indices, pos = moved(indices_of(4, 2, 3, 5), device), values(5, 32, seed=2).float().to(device)
    mask_token = values(32, seed=1).float().to(device).requires_grad_()
    same_compiled(lambda context, mask: assemble(context, mask, pos, **indices), tokens(4, 32, device), mask_token)


def test_target_loss(device):
    indices = torch.tensor([1, 1, 0], device=device)
    targets = [tokens(2, 48, device, seed).detach() for seed in (1, 2)]
    same_compiled(lambda p, t: target_loss(p, t, indices), tokens(3, 48, device), targets[0])
    same_compiled(lambda p, *layers: target_loss(p, layers, indices), tokens(3, 96, device), *targets)


def test_patchify(device):
    images = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8).to(device)
    indices = torch.tensor([7, 0, 2], dtype=torch.int32, device=device)
    same_compiled(lambda images: patchify(images, 14, dtype=torch.float32), images)
    same_compiled(lambda images: patchify(images, 14, indices_T=indices, dtype=torch.float32), images)


def test_short_attention(device):
    bounds = torch.tensor([0, 3, 3, 10], dtype=torch.int32, device=device)
    rows = tokens(10, 3 * 2 * 16, device)
    same_compiled(lambda rows: short_attention(rows.view(10, 3, 2, 16), bounds), rows)


def test_other_numbers_of_tokens_do_not_compile_again(device):
    """Once for fixed and once for any number."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    pos = values(5, 32, seed=2).float().to(device)

    def step(context, mask_token, indices, places):
        rows = assemble(context, mask_token, pos, **indices)
        return target_loss(gather_rows(rows, places), context.detach(), places % 2)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for count in (4, 5, 6, 7, 9):
        indices = moved(indices_of(count, 2, count + 3, 5), device)
        mask_token = values(32, seed=1).float().to(device).requires_grad_()
        compiled(tokens(count, 32, device), mask_token, indices, torch.arange(count + 1, device=device))
    assert counter.frame_count == 2


def test_a_module(device):
    embed = PatchEmbed(4, 24).to(device)
    images = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8).to(device)
    indices = torch.tensor([7, 0, 2], dtype=torch.int32, device=device)
    bias = embed.proj.bias
    same_compiled(lambda images, bias: embed(images, indices, torch.float32), images, bias)
