"""Folders of transformers' IJepaModel, against transformers itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ijepa_scale.data.transforms import center_crop
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import find, load

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def run():
    return load(OLD / "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("transformers") / "exported"
    export(str(OLD / "zero3"), out, form="transformers")
    return out


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModel

    model, said = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "IJepaModel" and not any(said.values())
    return model.eval()


def crops(count, side=16):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def picture(width, height):
    """Smooth, as photographs are: noise alone would be judged by its resize."""
    small = np.random.default_rng(width).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def spoilt(folder, tmp_path, *, config=None, weights=lambda weights: None):
    """A copy with another config or other weights."""
    values = {**json.loads((folder / "config.json").read_text()), **(config or {})}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    weights(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@torch.no_grad()
def test_the_features_of_pixels_are_ours(model, run):
    images = crops(3)
    theirs = model((images / 255 - MEAN) / STD).last_hidden_state
    torch.testing.assert_close(theirs, run.network(images), rtol=0, atol=1e-5)
    assert model.config.layer_norm_eps == 1e-6 and theirs.std() > 0.1


@pytest.mark.parametrize("size", [(50, 40), (17, 90), (400, 300), (12, 9)])
@torch.no_grad()
def test_the_features_of_a_picture_of_any_size_are_nearly_ours(folder, model, run, size):
    from transformers import AutoImageProcessor

    image = picture(*size)
    processor = AutoImageProcessor.from_pretrained(folder)
    theirs = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(1)
    ours = run.network(torch.from_numpy(center_crop(image, 16))[None]).mean(1)
    other = run.network(torch.from_numpy(center_crop(picture(60, 61), 16))[None]).mean(1)
    assert torch.cosine_similarity(theirs, ours) > 0.999 > torch.cosine_similarity(other, ours)


@torch.no_grad()
def test_a_picture_of_exactly_the_size_is_ours_where_nothing_is_resized(folder, model, run):
    from transformers import AutoImageProcessor

    image = picture(16, 16)
    pixels = AutoImageProcessor.from_pretrained(folder)(image, do_resize=False, return_tensors="pt")
    ours = run.network(torch.from_numpy(center_crop(image, 16))[None])
    torch.testing.assert_close(model(**pixels).last_hidden_state, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["transformers", "timm", "safetensors"])
def test_an_export_is_read_back_bit_for_bit(tmp_path, form):
    for network in ("target", "context"):
        out = tmp_path / network
        export(str(OLD / "zero2"), out, form=form, network=network)
        first, again = load(OLD / "zero2", network), load(out, network)
        assert (again.name, again.step, again.image_size, again.config) == (network, 4, 16, first.config)
        assert again.notes == () and again.network.size == first.network.size
        assert load(out).sha256 == again.sha256
        expected = first.network.state_dict()
        assert again.network.state_dict().keys() == expected.keys()
        assert all(torch.equal(values, expected[name]) for name, values in again.network.state_dict().items())
        lone = next(out.glob("*.safetensors"))
        assert load(lone, network).sha256 == again.sha256
        moved = tmp_path / f"{network}.safetensors"  # its header says what config.json did
        lone.rename(moved)
        assert load(moved, network).sha256 == again.sha256 and load(moved, network).network.size == first.network.size
    assert load(tmp_path / "target.safetensors").sha256 != load(tmp_path / "context.safetensors").sha256


def test_a_lone_encoder_answers_to_both_names_and_is_called_by_its_own(folder):
    assert find(folder).names == ("target",)
    loaded = load(folder, "context")
    assert loaded.name == "target" and "holds the target encoder alone" in loaded.notes[0]
    with pytest.raises(ValueError, match="holds no predictor; it holds: target"):
        load(folder, "predictor")


@pytest.mark.parametrize("how", ["shards", "pickle", "bfloat16", "names of version 5"])
def test_what_others_save_is_read(model, run, folder, tmp_path, how):
    expected = run.network.state_dict()
    if how == "shards":
        model.save_pretrained(tmp_path, max_shard_size="10kB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif how == "bfloat16":
        import copy

        copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
        expected = {name: values.bfloat16().float() for name, values in expected.items()}
    else:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        in_memory = model.state_dict()
        assert "layers.0.attention.q_proj.weight" in in_memory
        if how == "pickle":
            torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
        else:
            save_file(in_memory, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path)
    assert loaded.name == "context" and "does not say which encoder it holds" in loaded.notes[-1]
    found = loaded.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in found.items())
    assert all(values.dtype == torch.float32 for values in found.values())


def test_heads_are_those_of_the_config(folder, tmp_path):
    assert load(folder).network.size.heads == 2
    assert load(spoilt(folder, tmp_path, config={"num_attention_heads": 8})).network.size.heads == 8


def test_another_epsilon_is_told_or_refused(folder, tmp_path):
    told = load(spoilt(folder, tmp_path, config={"layer_norm_eps": 1e-12})).notes
    assert "add 1e-12 to the variance, ours 1e-06: nearly the same" in told[0]
    with pytest.raises(ValueError, match=r"add 0\.001 to the variance and ours 1e-06: features would differ"):
        load(spoilt(folder, tmp_path, config={"layer_norm_eps": 1e-3}))


def test_learned_positions_are_kept_and_told(folder, tmp_path):
    name = "embeddings.position_embeddings"
    loaded = load(spoilt(folder, tmp_path, weights=lambda weights: weights[name].add_(0.5)))
    assert torch.equal(loaded.network.pos_embed, load_file(folder / "model.safetensors")[name] + 0.5)
    assert "differ by up to 0.5 from the fixed ones" in loaded.notes[0]


@pytest.mark.parametrize(
    "config, weights, message",
    [
        ({"hidden_act": "gelu_new"}, lambda w: None, "its hidden_act is gelu_new"),
        ({"model_type": "vit"}, lambda w: None, "holds a vit of transformers; only its ijepa can be loaded"),
        (
            {},
            lambda w: w.update({"embeddings.cls_token": torch.zeros(1, 1, 16)}),
            r"an unexpected embeddings.cls_token \(1, 1, 16\)",
        ),
        (
            {},
            lambda w: w.update({"classifier.weight": torch.zeros(5, 16)}),
            r"an unexpected classifier.weight \(5, 16\)",
        ),
        (
            {},
            lambda w: w.pop("encoder.layer.1.attention.attention.key.bias"),
            r"unexpected encoder.layer.1.attention.attention.query.bias \(16,\)",
        ),
        ({}, lambda w: w.pop("layernorm.bias"), r"it lacks norm.bias \(16,\)"),
        (
            {},
            lambda w: w.update({"layernorm.weight": torch.zeros(17)}),
            r"norm.weight is \(17,\) and should be \(16,\)",
        ),
        (
            {},
            lambda w: w.update({"embeddings.position_embeddings": torch.zeros(1, 17, 16)}),
            r"pos_embed \(1, 17, 16\) has 17 patches, which is no square",
        ),
        ({}, lambda w: w.update({"layernorm.weight": torch.zeros(16, dtype=torch.int32)}), "is no tensor of floating"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, config, weights, message):
    with pytest.raises(ValueError, match=message):
        load(spoilt(folder, tmp_path, config=config, weights=weights))


def test_a_folder_without_its_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"layernorm.bias": "../secret"}}')
    with pytest.raises(ValueError, match=r"index\.json names \.\./secret"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load(tmp_path)
