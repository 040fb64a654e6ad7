import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.attention import packed_attention_reference
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.positions import sincos_pos_embed
from ijepa_scale.models.predictor import Predictor

GRID = PatchGrid(4, 4)
ENCODER_WIDTH, WIDTH, HEADS = 20, 12, 3


def tiny_predictor(seed=0):
    size = ViTSize(width=WIDTH, depth=2, heads=HEADS, mlp_width=30)
    predictor = Predictor(size, encoder_width=ENCODER_WIDTH, grid=GRID).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return predictor


def random_masks(seed, images=3, blocks=2, block_size=4, order="raster"):
    rng = np.random.default_rng(seed)
    context, targets = [], []
    for _ in range(images):
        context.append(rng.choice(16, rng.integers(1, 12), replace=False))
        targets.append([rng.choice(16, block_size, replace=False) for _ in range(blocks)])
        if order == "raster":
            context[-1].sort()
    return context, targets


def tokens_of(context, seed=1):
    rows = sum(map(len, context))
    return torch.randn(rows, ENCODER_WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def naive_prediction(weights, context_tokens, context_patches, block, depth=2):
    """One block of one image: (n, D) context tokens -> (K, D), in plain operations."""
    positions = sincos_pos_embed(WIDTH, GRID).double()
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    norm = lambda x, name: layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])  # noqa: E731
    rows = [
        linear(token, "predictor_embed") + positions[patch]
        for token, patch in zip(context_tokens, context_patches, strict=True)
    ]
    rows += [weights["mask_token"][0, 0] + positions[patch] for patch in block]
    x = torch.stack(rows)
    for i in range(depth):
        name = f"predictor_blocks.{i}"
        query, key, value = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(WIDTH, dim=1)
        heads = []
        for columns in torch.arange(WIDTH).chunk(HEADS):
            scores = query[:, columns] @ key[:, columns].T / (WIDTH // HEADS) ** 0.5
            heads.append(F.softmax(scores, dim=1) @ value[:, columns])
        x = x + linear(torch.cat(heads, dim=1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(hidden, f"{name}.mlp.fc2")
    return linear(norm(x[len(context_patches) :], "predictor_norm"), "predictor_proj")


def test_a_kernel_attends():
    plain, calls = tiny_predictor(), []

    def attend(qkv, sequences):
        calls.append((sequences.num_tokens, sequences.max_seqlen))
        return packed_attention_reference(qkv, sequences)

    predictor = Predictor(plain.size, encoder_width=ENCODER_WIDTH, grid=GRID, attend=attend).double()
    predictor.load_state_dict(plain.state_dict())
    context, targets = random_masks(0)
    masks, tokens = pack_masks(context, targets, 16), tokens_of(context)
    torch.testing.assert_close(predictor(tokens, masks), plain(tokens, masks), rtol=1e-12, atol=1e-12)
    assert calls == [(masks.prediction.num_tokens, masks.prediction.max_seqlen)] * 2


@pytest.mark.parametrize(
    "images, blocks, block_size, order", [(3, 2, 4, "raster"), (1, 1, 1, "raster"), (2, 4, 3, "any"), (1, 3, 16, "any")]
)
def test_value_and_every_gradient_match_one_block_at_a_time(images, blocks, block_size, order):
    predictor = tiny_predictor()
    context, targets = random_masks(images, images, blocks, block_size, order)
    tokens = tokens_of(context).requires_grad_()
    actual = predictor(tokens, pack_masks(context, targets, 16))
    weights = dict(predictor.named_parameters())
    expected = torch.cat(
        [
            naive_prediction(weights, image_tokens, patches.tolist(), block.tolist())
            for image_tokens, patches, image_blocks in zip(
                tokens.split([len(patches) for patches in context]), context, targets, strict=True
            )
            for block in image_blocks
        ]
    )
    assert actual.shape == (images * blocks * block_size, ENCODER_WIDTH)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [tokens, *weights.values()]
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert ours.abs().sum() > 0


def test_blocks_do_not_see_one_another_nor_other_images():
    predictor = tiny_predictor()
    context, targets = random_masks(7, images=2, blocks=2)
    tokens = tokens_of(context)
    before = predictor(tokens, pack_masks(context, targets, 16)).split(4)
    other = [[targets[0][0], 15 - targets[0][1]], [15 - targets[1][0], targets[1][1]]]
    after = predictor(tokens, pack_masks(context, other, 16)).split(4)
    same = [torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, False, True]
    changed = tokens.clone()
    changed[: len(context[0])] += 1
    after = predictor(changed, pack_masks(context, targets, 16)).split(4)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [False, False, True, True]


def test_a_prediction_depends_on_its_place_alone():
    """Mask tokens differ by their position embedding only: a repeated block gives the same rows, in any order."""
    predictor = tiny_predictor()
    block = np.array([1, 6, 11, 12])
    context, _ = random_masks(8, images=1)
    out = predictor(tokens_of(context), pack_masks(context, [[block, block[::-1], block]], 16))
    first, reversed_, third = out.split(4)
    torch.testing.assert_close(first, third, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first, reversed_.flip(0), rtol=1e-12, atol=1e-12)
    assert torch.pdist(first).min() > 1e-3


def test_names_are_those_of_public_checkpoints():
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["predictor_embed", "predictor_norm", "predictor_proj"]
    modules += [f"predictor_blocks.{i}.{part}" for i in range(2) for part in block]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    state = tiny_predictor().state_dict()
    assert set(state) == names | {"mask_token", "predictor_pos_embed"}
    assert state["mask_token"].shape == (1, 1, WIDTH) and state["predictor_pos_embed"].shape == (1, 16, WIDTH)


def test_bf16():
    context, targets = random_masks(9)
    tokens, masks = tokens_of(context), pack_masks(context, targets, 16)
    expected = tiny_predictor()(tokens, masks)
    out = tiny_predictor().bfloat16()(tokens.bfloat16(), masks)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().mean() < 0.05 * expected.abs().mean()
