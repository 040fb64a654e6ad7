import pytest
import torch
import transformers
from safetensors.torch import save_file

from ijepa_scale.masking.packing import Packed
from ijepa_scale.models import vit as vit_module
from ijepa_scale.models.attention import packed_attention_reference
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer

SIZE = ViTSize(width=24, depth=3, heads=3, mlp_width=40)
PATCH, IMAGE = 4, 20  # 5 x 5 patches


def tiny_vit(seed=0, size=SIZE, dtype=torch.float64):
    """Weights large enough that attention and GELU are far from linear, and no two parameters are alike."""
    vit = VisionTransformer(size, image_size=IMAGE, patch_size=PATCH).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return vit


def images_of(batch, seed=0):
    return torch.randint(256, (batch, 3, IMAGE, IMAGE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def pack(patches):
    """One list of patches an image -> Packed."""
    indices = [image * 25 + patch for image, chosen in enumerate(patches) for patch in chosen]
    bounds = [0]
    for chosen in patches:
        bounds.append(bounds[-1] + len(chosen))
    return Packed(
        torch.tensor(indices, dtype=torch.int32),
        torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(map(len, patches)),
        num_pairs=sum(len(chosen) ** 2 for chosen in patches),
    )


RAGGED = [[3, 4, 9, 24], [0], [1, 2, 3, 7, 12, 20, 21], list(range(25))]


@pytest.mark.parametrize("patches", [RAGGED, [[0, 5, 6], [2, 9, 24]]], ids=["ragged", "equal"])
def test_packing_changes_nothing(patches):
    vit, images = tiny_vit(), images_of(len(patches))
    packed = vit(images, pack(patches))
    alone = torch.cat([vit(images[b : b + 1], pack([chosen])) for b, chosen in enumerate(patches)])
    assert packed.shape == (sum(map(len, patches)), 24)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad(out, list(vit.parameters()), upstream) for out in (packed, alone)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_all_patches_packed_are_the_dense_output():
    vit, images = tiny_vit(), images_of(3)
    dense = vit(images)
    assert dense.shape == (3, 25, 24)
    torch.testing.assert_close(vit(images, pack([range(25)] * 3)), dense.flatten(0, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([vit(images[b : b + 1]) for b in range(3)]), dense, rtol=1e-12, atol=1e-12)


ROWS = torch.tensor([0, 3, 24, 25, 60, 61, 62, 74])  # of 5 images of 25 patches; none of the last two


@pytest.mark.parametrize("tokens", [25, 60, 1000], ids=["one image at a time", "two", "all"])
@pytest.mark.parametrize("rows", [None, ROWS], ids=["all rows", "some rows"])
def test_parts_and_rows_are_those_of_the_whole(tokens, rows, monkeypatch):
    monkeypatch.setattr(vit_module, "CPU_TOKENS", tokens)
    vit, images = tiny_vit(), images_of(5)
    whole = vit(images)  # with gradients: at once
    with torch.no_grad():
        actual = vit(images, rows_K=rows)
    expected = whole if rows is None else whole.flatten(0, 1)[rows]
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)


def test_rows_of_packed_tokens_with_their_gradients():
    vit, images, rows = tiny_vit(), images_of(len(RAGGED)), torch.tensor([1, 4, 5, 9, 20])
    results = []
    for out in (vit(images, pack(RAGGED), rows_K=rows), vit(images, pack(RAGGED))[rows]):
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((out, *torch.autograd.grad(out, list(vit.parameters()), upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def counting(calls):
    """A kernel that is the definition, and the sequences it was called with."""

    def attend(qkv, sequences):
        calls.append(sequences)
        return packed_attention_reference(qkv, sequences)

    return attend


def test_a_kernel_attends_over_packed_tokens_alone():
    plain, images, calls = tiny_vit(), images_of(len(RAGGED)), []
    vit = VisionTransformer(SIZE, image_size=IMAGE, patch_size=PATCH, attend=counting(calls)).double()
    vit.load_state_dict(plain.state_dict())
    torch.testing.assert_close(vit(images, pack(RAGGED)), plain(images, pack(RAGGED)), rtol=1e-12, atol=1e-12)
    assert len(calls) == SIZE.depth and all(call is calls[0] for call in calls)
    assert (calls[0].max_seqlen, calls[0].num_tokens, calls[0].count) == (25, 37, 4)
    vit(images, pack([[0, 5, 6], [2, 9, 24]]))  # of one length, too: one kernel for all that is packed
    assert len(calls) == 2 * SIZE.depth
    vit(images)
    assert len(calls) == 2 * SIZE.depth


@pytest.mark.parametrize("kernel", [False, True])
def test_padding_as_the_last_sequence_changes_nothing(kernel):
    """To round up the number of tokens: whatever patches it names, and whatever gradient the others have."""
    vit, images = tiny_vit(), images_of(len(RAGGED))
    expected = vit(images, pack(RAGGED))
    vit.attend = counting([]) if kernel else None
    padded = vit(images, pack([*RAGGED, [-100, -100, -97, -100]]))  # patches of the first image, once more
    torch.testing.assert_close(padded[: len(expected)], expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(out, list(vit.parameters()), upstream) for out in (padded[: len(expected)], expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_what_is_not_packed_is_not_seen():
    vit, images = tiny_vit(), images_of(4)
    before = vit(images, pack(RAGGED))
    hidden = images.clone()
    hidden[0, :, 16:, :16] = 255  # patches 20..23: image 0 shows only 24 of its last row
    hidden[1, :, 4:] = 0
    assert torch.equal(vit(hidden, pack(RAGGED)), before)
    hidden[0, :, 16:, 16:] = 255  # patch 24
    after = vit(hidden, pack(RAGGED))
    assert (after[:4] != before[:4]).any(1).all()  # every token of its image attends to it
    assert torch.equal(after[4:], before[4:])


def test_tokens_depend_on_which_others_are_packed():
    """A context token's output is not the dense one: attention runs among the context alone."""
    vit, images = tiny_vit(), images_of(1)
    chosen = [3, 4, 9, 24]
    dense = vit(images)[0, chosen]
    assert ((vit(images, pack([chosen])) - dense).abs().amax(1) > 1e-3).all()
    # Without blocks there is nothing to attend with, and they agree.
    flat = tiny_vit(size=ViTSize(width=24, depth=1, heads=3, mlp_width=40))
    flat.blocks = torch.nn.ModuleList()
    torch.testing.assert_close(flat(images, pack([chosen])), flat(images)[0, chosen], rtol=1e-13, atol=1e-13)


def test_the_order_of_patches_permutes_the_output():
    vit, images = tiny_vit(), images_of(1)
    forwards, order = [3, 4, 9, 24, 11], [4, 0, 3, 1, 2]
    out = vit(images, pack([forwards]))
    torch.testing.assert_close(vit(images, pack([[forwards[i] for i in order]])), out[order], rtol=1e-12, atol=1e-12)


def test_the_same_pixels_elsewhere_give_another_token():
    vit = tiny_vit()
    images = torch.full((1, 3, IMAGE, IMAGE), 77, dtype=torch.uint8)
    tokens = vit(images)[0]
    assert torch.pdist(tokens).min() > 1e-3


def hugging_face_twin(vit, folder, attention="sdpa"):
    """transformers.IJepaModel with the same weights, in the same dtype.

    It goes through a folder, whose names are those of the published models in every version of transformers.
    Its "eager" attention takes the softmax in fp32, so in float64 "sdpa" it is.
    """
    size = vit.size
    config = transformers.IJepaConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp_width,
        image_size=vit.grid.rows * vit.patch_embed.patch_size,
        patch_size=vit.patch_embed.patch_size,
        layer_norm_eps=1e-6,
    )
    renames = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("blocks.", "encoder.layer."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ]
    weights = {}
    for name, tensor in vit.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            weights[name] = tensor
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    twin, loading = transformers.IJepaModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        dtype=vit.dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return twin.eval()


def imagenet_normalized(images):
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    return (images.double() / 255 - mean) / std


@torch.no_grad()
def test_equals_transformers(tmp_path):
    vit, images = tiny_vit(), images_of(3)
    twin = hugging_face_twin(vit, tmp_path)
    expected = twin(pixel_values=imagenet_normalized(images)).last_hidden_state
    assert (vit(images) - expected).abs().max() <= 1e-10
    assert expected.std() > 0.5  # a comparison of something


@torch.no_grad()
def test_a_packed_context_equals_transformers_on_the_tokens_kept(tmp_path):
    vit, images = tiny_vit(), images_of(len(RAGGED))
    twin = hugging_face_twin(vit, tmp_path)
    embedded = twin.embeddings(imagenet_normalized(images))
    rows = []
    for image, chosen in enumerate(RAGGED):
        tokens = embedded[image : image + 1, chosen]
        for layer in twin.layers if hasattr(twin, "layers") else twin.encoder.layer:
            out = layer(tokens)
            tokens = out if isinstance(out, torch.Tensor) else out[0]
        rows.append(twin.layernorm(tokens)[0])
    assert (vit(images, pack(RAGGED)) - torch.cat(rows)).abs().max() <= 1e-10


def test_names_are_those_of_public_checkpoints():
    names = {name for name, _ in tiny_vit().state_dict().items()}
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", "norm"] + [f"blocks.{i}.{part}" for i in range(3) for part in block]
    assert names == {"pos_embed"} | {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert tiny_vit().pos_embed.shape == (1, 25, 24)


@pytest.mark.parametrize(
    "name, patch_size, millions",
    [
        ("vit_base", 16, 86),
        ("vit_large", 16, 303),
        ("vit_huge", 14, 631),
        ("vit_giant", 16, 1011),
        ("vit_gigantic", 14, 1843),
    ],
)
def test_the_paper_sizes(name, patch_size, millions):
    with torch.device("meta"):
        vit = VisionTransformer(VIT_SIZES[name], image_size=224, patch_size=patch_size)
    assert abs(sum(p.numel() for p in vit.parameters()) / 1e6 - millions) < 1.5


def test_bf16():
    exact, images = tiny_vit(), images_of(4)
    vit = tiny_vit().bfloat16()
    assert vit.dtype == torch.bfloat16
    for out, expected in (
        (vit(images), exact(images)),
        (vit(images, pack(RAGGED)), exact(images, pack(RAGGED))),
    ):
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_packed_tokens_of_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"of images of \(5, 5\) patches, got images of \(5, 6\)"):
        tiny_vit()(torch.zeros(1, 3, 20, 24, dtype=torch.uint8), pack([[0, 3]]))
    for sides in ((20, 22), (2, 20), (0, 0)):
        with pytest.raises(ValueError, match=r"multiples of the patch, 4 pixels, got \d+ x \d+; resize or crop it"):
            tiny_vit()(torch.zeros(1, 3, *sides, dtype=torch.uint8))


@pytest.mark.parametrize("width, heads, depth", [(24, 5, 1), (6, 3, 1), (24, 0, 1), (24, -3, 1), (24, 3, 0), (0, 1, 1)])
def test_sizes_that_cannot_be_built(width, heads, depth):
    with pytest.raises(ValueError, match="width a multiple of its heads and of 4"):
        ViTSize(width=width, depth=depth, heads=heads, mlp_width=8)
