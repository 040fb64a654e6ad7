"""Drop path: factors of what each branch of a block adds to an image's tokens."""

import pytest
import torch

from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import Block, ViTSize, recompute, run_blocks
from ijepa_scale.models.vit import VisionTransformer

SIZE = ViTSize(width=16, depth=3, heads=2, mlp_width=24)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    vit = VisionTransformer(SIZE, image_size=16, patch_size=4).double()
    for parameter in vit.parameters():  # so that biases and branches count
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def slow_blocks(vit: VisionTransformer, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """One image at a time, each branch told from blocks whose other branch adds nothing."""
    outputs = []
    for b, image in enumerate(images):
        tokens = vit.patch_embed(image[None], None, vit.dtype) + vit.pos_embed[0]
        for i, block in enumerate(vit.blocks):
            q, k, v = block.attn.qkv(block.norm1(tokens)).view(16, 3, 2, 8).permute(1, 2, 0, 3)
            mixed = ((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
            tokens = tokens + keep[i, b, 0] * block.attn.proj(mixed)
            hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(tokens)))
            tokens = tokens + keep[i, b, 1] * block.mlp.fc2(hidden)
        outputs.append(vit.norm(tokens))
    return torch.stack(outputs)


def test_each_branch_of_each_image_has_its_factor(encoder, images):
    keep = torch.rand(3, 5, 2, dtype=torch.float64) * (torch.rand(3, 5, 2) < 0.7)
    expected = slow_blocks(encoder, images, keep)
    torch.testing.assert_close(encoder(images, keep=keep), expected)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images, keep=keep), expected)
        rows = torch.tensor([0, 17, 18, 50, 79])
        torch.testing.assert_close(encoder(images, rows_K=rows, keep=keep), expected.flatten(0, 1)[rows])
    assert not torch.allclose(expected, encoder(images))


def test_factors_of_one_are_no_drop_path_and_gradients_are_recomputed(encoder, images):
    torch.testing.assert_close(encoder(images, keep=torch.ones(3, 5, 2)), encoder(images))
    keep = torch.rand(3, 5, 2)
    gradients = []
    for every in (0, 2):
        recompute(encoder.blocks, every)
        encoder.zero_grad()
        encoder(images, keep=keep).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_sequences_of_several_lengths_have_factors_of_their_own():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(SIZE) for _ in range(3))
    tokens, keep = torch.randn(9, 16), torch.rand(3, 2, 2)
    both = run_blocks(blocks, tokens, Sequences(torch.tensor([0, 2, 9], dtype=torch.int32), 7, 9), None, keep)
    for start, stop, which in ((0, 2, 0), (2, 9, 1)):
        alone = Sequences(torch.tensor([0, stop - start], dtype=torch.int32), stop - start, stop - start)
        expected = run_blocks(blocks, tokens[start:stop], alone, None, keep[:, which : which + 1])
        torch.testing.assert_close(both[start:stop], expected)
