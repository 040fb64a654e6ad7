import math
import pathlib

import numpy as np
import pytest
import torch

from ijepa_scale.exchange.reference import load_reference_checkpoint
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer

ENCODER = ViTSize(width=24, depth=2, heads=3, mlp_width=40)
PREDICTOR = ViTSize(width=12, depth=3, heads=3, mlp_width=20)
PATCH, SIDE = 4, 3


def positions(width, side):
    """(1, side * side, width) as the reference stores it: column first, then row; sines, then cosines."""
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows = []
    for row in range(side):
        for column in range(side):
            rows.append(np.concatenate([f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)]))
    return torch.tensor(np.array(rows)[None], dtype=torch.float32)


class Draw:
    """Random tensors under the reference's names."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = {}

    def tensor(self, name, *shape):
        self.weights[f"module.{name}"] = 0.2 * torch.randn(shape, generator=self.generator)

    def layer(self, name, *shape):
        self.tensor(f"{name}.weight", *shape)
        self.tensor(f"{name}.bias", shape[0])

    def blocks(self, name, size):
        for i in range(size.depth):
            self.layer(f"{name}.{i}.norm1", size.width)
            self.layer(f"{name}.{i}.attn.qkv", 3 * size.width, size.width)
            self.layer(f"{name}.{i}.attn.proj", size.width, size.width)
            self.layer(f"{name}.{i}.norm2", size.width)
            self.layer(f"{name}.{i}.mlp.fc1", size.mlp_width, size.width)
            self.layer(f"{name}.{i}.mlp.fc2", size.width, size.mlp_width)


def encoder_weights(seed, size=ENCODER, patch=PATCH, side=SIDE):
    draw = Draw(seed)
    draw.weights["module.pos_embed"] = positions(size.width, side)
    draw.layer("patch_embed.proj", size.width, 3, patch, patch)
    draw.blocks("blocks", size)
    draw.layer("norm", size.width)
    return draw.weights


def predictor_weights(seed, size=PREDICTOR, encoder_width=ENCODER.width, side=SIDE):
    draw = Draw(seed)
    draw.tensor("mask_token", 1, 1, size.width)
    draw.weights["module.predictor_pos_embed"] = positions(size.width, side)
    draw.layer("predictor_embed", size.width, encoder_width)
    draw.blocks("predictor_blocks", size)
    draw.layer("predictor_norm", size.width)
    draw.layer("predictor_proj", encoder_width, size.width)
    return draw.weights


def reference_checkpoint():
    """What the reference saves, by its own names and nesting, at a tiny size."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)}}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04, "WD_exclude": True, "params": [0]}
    return {
        "encoder": encoder_weights(0),
        "predictor": predictor_weights(1),
        "target_encoder": encoder_weights(2),
        "opt": {"state": moments, "param_groups": [group]},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 7},
        "epoch": 300,
        "loss": 0.123,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }


@pytest.fixture
def save(tmp_path):
    def save(checkpoint, **options):
        path = tmp_path / "jepa-latest.pth.tar"
        torch.save(checkpoint, path, **options)
        return path

    return save


def stripped(weights):
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def test_the_three_networks_have_the_stored_weights(save):
    checkpoint = reference_checkpoint()
    model = load_reference_checkpoint(save(checkpoint), heads=3)
    parts = {
        "encoder": model.context_encoder,
        "predictor": model.predictor,
        "target_encoder": model.target_encoder,
    }
    for part, network in parts.items():
        loaded, stored = network.state_dict(), stripped(checkpoint[part])
        assert loaded.keys() == stored.keys()
        for name, tensor in stored.items():
            assert torch.equal(loaded[name], tensor), f"{part}.{name}"
            assert loaded[name].dtype == torch.float32 and loaded[name].device.type == "cpu"
    assert model.context_encoder.size == model.target_encoder.size == ENCODER
    assert model.predictor.size == PREDICTOR
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    for network in (model.context_encoder, model.predictor):
        assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in network.parameters())


def test_outputs_are_those_of_networks_with_these_weights(save):
    checkpoint = reference_checkpoint()
    path = save(checkpoint)
    model = load_reference_checkpoint(path, heads=3)
    with path.open("r+b") as file:  # the file was mapped into memory; the networks outlive it
        file.write(bytes(path.stat().st_size))
    encoder, target = (VisionTransformer(ENCODER, image_size=PATCH * SIDE, patch_size=PATCH) for _ in range(2))
    predictor = Predictor(PREDICTOR, encoder_width=ENCODER.width, grid=encoder.grid)
    for network, part in ((encoder, "encoder"), (target, "target_encoder"), (predictor, "predictor")):
        network.load_state_dict(stripped(checkpoint[part]))
    images = torch.randint(256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    masks = pack_masks([np.array([0, 1, 5]), np.array([2, 8])], [[np.array([3, 4])], [np.array([6, 7])]], 9)
    with torch.no_grad():
        expected_target, expected_context = target(images), encoder(images, masks.context)
        assert torch.equal(model.target_encoder(images), expected_target)
        assert torch.equal(model.context_encoder(images, masks.context), expected_context)
        assert torch.equal(model.predictor(expected_context, masks), predictor(expected_context, masks))
    loss = model(images, masks)["loss"]
    loss.backward()
    assert math.isfinite(loss.item()) and model.context_encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit_tiny"])
def test_a_known_size_needs_no_heads(name, save):
    size = VIT_SIZES[name]
    predictor = ViTSize(width=36, depth=1, heads=size.heads, mlp_width=64)
    checkpoint = {
        "encoder": encoder_weights(0, size, patch=16, side=2),
        "predictor": predictor_weights(1, predictor, size.width, side=2),
        "target_encoder": encoder_weights(2, size, patch=16, side=2),
    }
    model = load_reference_checkpoint(save(checkpoint))
    assert model.context_encoder.size == model.target_encoder.size == size
    assert model.predictor.size == predictor
    assert model.target_encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 4, size.width)
    assert load_reference_checkpoint(save(checkpoint), heads=6, predictor_heads=4).predictor.size.heads == 4


def test_heads_that_are_not_known_must_be_given(save):
    path = save(reference_checkpoint())
    with pytest.raises(ValueError, match=r"width 24, depth 2 and mlp_width 40, and weights do not show .*; give heads"):
        load_reference_checkpoint(path)
    with pytest.raises(ValueError, match="width a multiple of its heads"):
        load_reference_checkpoint(path, heads=5)
    with pytest.raises(ValueError, match="width a multiple of its heads"):
        load_reference_checkpoint(path, heads=0)
    with pytest.raises(ValueError, match="width a multiple of its heads"):
        load_reference_checkpoint(path, heads=3, predictor_heads=5)
    model = load_reference_checkpoint(path, heads=6, predictor_heads=2)
    assert model.context_encoder.size.heads == 6 and model.predictor.size.heads == 2
    assert load_reference_checkpoint(path, heads=6).predictor.size.heads == 6


def test_a_file_of_old_torch_and_a_half_precision_one(save):
    checkpoint = reference_checkpoint()
    old = load_reference_checkpoint(str(save(checkpoint, _use_new_zipfile_serialization=False)), heads=3)
    name = "module.norm.weight"
    assert torch.equal(old.target_encoder.norm.weight, checkpoint["target_encoder"][name])
    checkpoint["encoder"][name] = checkpoint["encoder"][name].half()
    model = load_reference_checkpoint(save(checkpoint), heads=3)
    assert torch.equal(model.context_encoder.norm.weight, checkpoint["encoder"][name].float())


def test_stored_positions_win_bit_for_bit_where_they_agree(save):
    checkpoint = reference_checkpoint()
    changed = checkpoint["target_encoder"]["module.pos_embed"]
    changed[0, 4, 7] += 5e-6
    model = load_reference_checkpoint(save(checkpoint), heads=3)
    assert torch.equal(model.target_encoder.pos_embed, changed)
    assert not torch.equal(model.context_encoder.pos_embed, changed)


@pytest.mark.parametrize(
    "part, name", [("encoder", "pos_embed"), ("target_encoder", "pos_embed"), ("predictor", "predictor_pos_embed")]
)
def test_other_positions_are_refused(part, name, save):
    for change, difference in ((0.25, "0.25"), (3e-5, "3e-05"), (math.nan, "nan")):
        checkpoint = reference_checkpoint()
        checkpoint[part][f"module.{name}"][0, 5, 3] += change
        with pytest.raises(
            ValueError, match=rf" {part}.{name} differs by up to {difference} from the fixed sine-cosine"
        ):
            load_reference_checkpoint(save(checkpoint), heads=3)
    checkpoint = reference_checkpoint()
    stored = checkpoint[part][f"module.{name}"]
    checkpoint[part][f"module.{name}"] = stored.view(1, 3, 3, -1).transpose(1, 2).reshape(stored.shape)  # rows first
    with pytest.raises(ValueError, match=f"{part}.{name} differs by up to"):
        load_reference_checkpoint(save(checkpoint), heads=3)


def drop(part, name):
    return lambda checkpoint: checkpoint[part].pop(f"module.{name}")


def put(part, name, value):
    return lambda checkpoint: checkpoint[part].update({name: value})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop("encoder", "norm.bias"), "it lacks encoder.norm.bias"),
        (drop("target_encoder", "blocks.1.attn.qkv.bias"), "it lacks target_encoder.blocks.1.attn.qkv.bias"),
        (drop("predictor", "mask_token"), "it lacks predictor.mask_token"),
        (drop("target_encoder", "pos_embed"), "it lacks target_encoder.pos_embed"),
        (drop("encoder", "pos_embed"), "pos_embed is missing"),
        (drop("encoder", "patch_embed.proj.weight"), "patch_embed.proj.weight is missing"),
        (drop("predictor", "predictor_blocks.0.mlp.fc1.weight"), "predictor_blocks.0.mlp.fc1.weight is missing"),
        (drop("predictor", "predictor_embed.weight"), "it lacks predictor.predictor_embed.weight"),
        (put("encoder", "module.cls_token", torch.zeros(1)), "it has an unexpected encoder.cls_token"),
        (put("predictor", "module.head.weight", torch.zeros(1)), "it has an unexpected predictor.head.weight"),
        (put("target_encoder", "module.blocks.2.norm1.bias", torch.zeros(24)), "an unexpected target_encoder.bl"),
        (
            put("predictor", "module.predictor_proj.weight", torch.zeros(24, 13)),
            r"predictor.predictor_proj.weight is \(24, 13\) and should be \(24, 12\)",
        ),
        (put("predictor", "module.predictor_embed.weight", torch.zeros(12, 20)), r"should be \(12, 24\)"),
        (put("target_encoder", "module.norm.weight", torch.zeros(25)), r"norm.weight is \(25,\) and should be \(24,\)"),
        (put("predictor", "module.predictor_pos_embed", torch.zeros(1, 16, 12)), r"should be \(1, 9, 12\)"),
        (put("encoder", "module.pos_embed", torch.zeros(9, 24)), r"pos_embed is \(9, 24\).* has 3 dimensions"),
        (put("encoder", "module.pos_embed", torch.zeros(1, 8, 24)), "8 patches, which is no square grid"),
        (put("encoder", "norm.weight", torch.zeros(24)), "encoder holds norm.weight, but .* begin with module."),
        (put("encoder", "module.norm.weight", [1.0] * 24), "encoder.module.norm.weight is no tensor of floating"),
        (put("predictor", "module.mask_token", torch.zeros(1, 1, 12, dtype=torch.int64)), "is no tensor of floating"),
        (lambda c: c["predictor"].clear(), "is missing"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(spoil, message, save):
    checkpoint = reference_checkpoint()
    spoil(checkpoint)
    path = save(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        load_reference_checkpoint(path, heads=3)
    assert str(caught.value).startswith(f"cannot load {path} as a checkpoint of the I-JEPA reference: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_many_problems_are_counted_not_listed(save):
    checkpoint = reference_checkpoint()
    checkpoint["target_encoder"] = {}
    with pytest.raises(ValueError, match=r"it lacks target_encoder.pos_embed \(1, 9, 24\); .*; and 21 more$"):
        load_reference_checkpoint(save(checkpoint), heads=3)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "no weights under encoder, predictor, target_encoder, but holds list"),
        ({}, "but holds nothing"),
        ({"model": {}, "epoch": 3}, "but holds model, epoch"),
        (
            {"encoder": encoder_weights(0), "predictor": 5},
            "no weights under predictor, target_encoder, but holds encoder",
        ),
        (encoder_weights(0), "but holds module.pos_embed, module.patch_embed.proj.weight"),
    ],
)
def test_other_files_of_torch_save_are_refused(content, message, save):
    with pytest.raises(ValueError, match=f"is no checkpoint of the I-JEPA reference: it has .*{message}"):
        load_reference_checkpoint(save(content))


def test_no_file_and_damaged_files_are_refused(save, tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint file .*absent.pth"):
        load_reference_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="there is no checkpoint file"):
        load_reference_checkpoint(tmp_path)
    whole = save(reference_checkpoint()).read_bytes()
    path = tmp_path / "damaged.pth.tar"
    for content in (
        b"",
        b"not a checkpoint at all\n" * 50,
        whole[: len(whole) // 2],
        whole[:-100],
        whole[100:],
        bytes(999),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path} is no whole file of torch.save\(\)") as caught:
            load_reference_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_code_in_the_file_is_not_run(save, tmp_path):
    class Touch:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "owned",)

    checkpoint = {**reference_checkpoint(), "opt": Touch()}
    with pytest.raises(ValueError, match="tensors and plain values only"):
        load_reference_checkpoint(save(checkpoint), heads=3)
    assert not (tmp_path / "owned").exists()
