"""Outputs of blocks, attention weights and other image sizes, against transformers.IJepaModel with the same weights."""

import pytest
import torch

from ijepa_scale.models import vit as vit_module
from ijepa_scale.models.blocks import Block, ViTSize
from tests.models.test_vit import IMAGE, PATCH, hugging_face_twin, imagenet_normalized, images_of, tiny_vit

SIZE = ViTSize(width=24, depth=5, heads=3, mlp_width=40)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(size=SIZE, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def twin(vit, tmp_path_factory):
    return hugging_face_twin(vit, tmp_path_factory.mktemp("twin"), attention="eager")


def images_of_size(height, width, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (batch, 3, height, width), generator=generator).to(torch.uint8)


@torch.no_grad()
def hooked(twin, images, **options):
    """Outputs of the twin's layers by hooks, and all that it returns."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out.clone())) for layer in twin.layers]
    returned = twin(pixel_values=imagenet_normalized(images).float(), **options)
    for hook in hooks:
        hook.remove()
    return outputs, returned


@pytest.mark.parametrize("tokens", [50, 1000], ids=["in parts", "at once"])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_of_blocks_are_the_twins(vit, twin, tokens, grad, monkeypatch):
    monkeypatch.setattr(vit_module, "CPU_TOKENS", tokens)
    images = images_of(3)
    outputs, returned = hooked(twin, images, output_hidden_states=True)
    assert len(outputs) == 5 and (outputs[0] - outputs[-1]).abs().max() > 0.1
    asked = [3, 0, -1, -2, 3]
    with torch.set_grad_enabled(grad):
        plain, normed = vit.intermediate(images, asked, norm=False), vit.intermediate(images, asked)
        maps = vit.intermediate(images, asked, maps=True)
        whole = vit(images)
    for block, raw, final, on_map in zip(asked, plain, normed, maps, strict=True):
        assert raw.shape == (3, 25, 24) and on_map.shape == (3, 5, 5, 24)
        torch.testing.assert_close(raw, outputs[block], **CLOSE)
        torch.testing.assert_close(raw, returned.hidden_states[1:][block], **CLOSE)
        torch.testing.assert_close(final, twin.layernorm(outputs[block]), **CLOSE)
        assert torch.equal(on_map.flatten(1, 2), final)
        assert torch.equal(on_map[:, 1, 3], final[:, 8])
    assert torch.equal(normed[2], whole)


def test_the_papers_concatenation_of_the_last_four(vit, twin):
    images = images_of(3)
    outputs, _ = hooked(twin, images)
    pooled = torch.cat([tokens.mean(dim=1) for tokens in vit.intermediate(images, range(-4, 0))], dim=-1)
    expected = torch.cat([twin.layernorm(out).mean(dim=1) for out in outputs[-4:]], dim=-1)
    torch.testing.assert_close(pooled, expected, **CLOSE)


@pytest.mark.parametrize("tokens", [50, 1000], ids=["in parts", "at once"])
def test_attention_weights_are_the_twins(vit, twin, tokens, monkeypatch):
    monkeypatch.setattr(vit_module, "CPU_TOKENS", tokens)
    images = images_of(3)
    _, returned = hooked(twin, images, output_attentions=True)
    asked = [-1, 0, 2]
    with torch.no_grad():
        for block, weights in zip(asked, vit.attention_weights(images, asked), strict=True):
            assert weights.shape == (3, 3, 25, 25) and weights.dtype == torch.float32
            torch.testing.assert_close(weights, returned.attentions[block], **CLOSE)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert tiny_vit(dtype=dtype).attention_weights(images, [0])[0].dtype == expected


@pytest.mark.parametrize("blocks", [[], [5], [-6], [0, 9]])
def test_blocks_that_are_not_there(vit, blocks):
    for method in (vit.intermediate, vit.attention_weights):
        with pytest.raises(ValueError, match=r"blocks must be one or more of -5..4, got \["):
            method(images_of(1), blocks)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["after", "before", "global"])
def test_hooks_on_blocks_are_given_what_stays(vit, kind):
    """Not a tensor that the next block writes over."""
    images, seen = images_of(3), []
    expected = vit.intermediate(images, range(5), norm=False)
    keep = {
        "after": lambda block, given, out: seen.append(out),
        "before": lambda block, given: seen.append(given[0]),
        "global": lambda module, given, out: seen.append(out) if isinstance(module, Block) else None,
    }[kind]
    if kind == "global":
        hooks = [torch.nn.modules.module.register_module_forward_hook(keep)]
    else:
        register = "register_forward_hook" if kind == "after" else "register_forward_pre_hook"
        hooks = [getattr(block, register)(keep) for block in vit.blocks]
    try:
        out = vit(images)
    finally:
        for hook in hooks:
            hook.remove()
    true = expected if kind != "before" else expected[:-1]
    for kept, wanted in zip(seen[kind == "before" :], true, strict=True):
        assert torch.equal(kept.view(wanted.shape), wanted)
    assert torch.equal(vit(images), out)  # written over now, to the same bits


@pytest.mark.parametrize("height, width", [(20, 28), (12, 20), (40, 40), (36, 8), (4, 100)])
def test_images_of_any_size_are_the_twins(vit, twin, height, width):
    images = images_of_size(height, width)
    outputs, returned = hooked(twin, images, interpolate_pos_encoding=True)
    with torch.no_grad():
        tokens, (on_map,) = vit(images), vit.intermediate(images, [1], norm=False, maps=True)
        assert tokens.shape == (3, height // PATCH * (width // PATCH), 24)
        torch.testing.assert_close(tokens, returned.last_hidden_state, **CLOSE)
        assert on_map.shape == (3, height // PATCH, width // PATCH, 24)
        torch.testing.assert_close(on_map.flatten(1, 2), outputs[1], **CLOSE)
        rows = torch.tensor([0, 4, 5])
        torch.testing.assert_close(vit(images, rows_K=rows), tokens.flatten(0, 1)[rows])


def test_the_own_size_needs_no_other_positions(vit, twin):
    images = images_of_size(IMAGE, IMAGE)
    torch.testing.assert_close(vit(images), hooked(twin, images)[1].last_hidden_state, **CLOSE)
