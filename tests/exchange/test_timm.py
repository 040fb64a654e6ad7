"""Folders, files and models of timm, against timm itself."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa_scale.exchange import timm as ours
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import load
from ijepa_scale.exchange.record import Record
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL |= {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("timm") / "exported"
    export(str(OLD / "zero3"), out, form="timm")
    return out


def crops(count, side=16):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def timm_model(**arguments):
    """A vision transformer of timm, by its own names, with random weights: of vit_tiny's sizes, whose heads we know."""
    from timm.models.vision_transformer import VisionTransformer as Timm

    torch.manual_seed(0)
    model = Timm(**{**SMALL, **arguments}).eval()
    model.pretrained_cfg = {}
    return model


@pytest.mark.parametrize("how", ["local-dir", "checkpoint_path", "pretrained_cfg_overlay"])
@torch.no_grad()
def test_timm_gives_our_features_and_those_of_our_blocks(folder, how):
    import timm

    run = load(OLD / "zero3").network
    if how == "local-dir":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    else:  # which load strictly
        config, path = ours.config_of(Record.of(load(folder))), str(folder / "model.safetensors")
        overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
        options = {"checkpoint_path": path} if how == "checkpoint_path" else overlay
        model = timm.create_model(config["architecture"], **options, **config["model_args"]).eval()
    assert model.state_dict().keys() == run.state_dict().keys()
    assert all(torch.equal(values, run.state_dict()[name]) for name, values in model.state_dict().items())
    images = crops(3)
    pixels = (images / 255 - MEAN) / STD
    expected = run(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(model.forward_features(pixels), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(pixels), expected.mean(1), rtol=0, atol=1e-5)
    for norm in (True, False):
        last, between = model.forward_intermediates(pixels, indices=2, norm=norm, output_fmt="NLC")
        torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)
        for theirs, block in zip(between, run.intermediate(images, [0, 1], norm=norm), strict=True):
            torch.testing.assert_close(theirs, block, rtol=0, atol=1e-5)


QUICK = ("vit_base", "vit_huge")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VIT_SIZES])
def test_every_size_has_its_heads_and_its_shapes(name):
    """vit_base_patch16_gap_224 of timm has 16 heads: shapes agree, and features would not."""
    import timm

    size, patch_size = VIT_SIZES[name], 14 if name in ("vit_huge", "vit_gigantic") else 16
    record = Record(network="target", size=size, image_size=224, patch_size=patch_size)
    config = ours.config_of(record)
    with torch.device("meta"):
        model = timm.create_model(config["architecture"], **config["model_args"])
        encoder = VisionTransformer(size, image_size=224, patch_size=patch_size)
    assert {block.attn.num_heads for block in model.blocks} == {size.heads}
    shapes = {key: values.shape for key, values in encoder.state_dict().items()}
    assert {key: values.shape for key, values in model.state_dict().items()} == shapes
    named = {"vit_huge": "vit_huge_patch14_gap_224", "vit_giant": "vit_giant_patch16_gap_224"}
    assert config["architecture"] == named.get(name, "vit_base_patch16_gap_224")


@pytest.mark.parametrize("side, width, mlp_width", [(16, 1000, 3333), (90, 44, 190), (224, 1408, 6144), (448, 28, 97)])
def test_an_mlp_and_a_resize_are_not_rounded_away(side, width, mlp_width):
    size = ViTSize(width=width, depth=1, heads=1, mlp_width=mlp_width)
    config = ours.config_of(Record(network="target", size=size, image_size=side, patch_size=2))
    assert int(width * config["model_args"]["mlp_ratio"]) == mlp_width
    assert math.floor(side / config["pretrained_cfg"]["crop_pct"]) == round(side * 256 / 224)


@pytest.mark.parametrize(
    "file, wrap",
    [
        ("plain.pth", lambda w: w),
        ("last.pth.tar", lambda w: {"state_dict": w, "epoch": 3, "args": argparse.Namespace(lr=1.0)}),
        ("model.bin", lambda w: {"model": {f"module.{name}": t for name, t in w.items()}}),
        ("encoder.pth", lambda w: {"encoder": {f"module.backbone.{name}": t for name, t in w.items()}}),
        ("half.safetensors", lambda w: w),
    ],
)
@torch.no_grad()
def test_files_of_weights_are_read_in_their_wrappings(tmp_path, file, wrap):
    model, path = timm_model(), tmp_path / file
    content = wrap(dict(model.state_dict()))
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    loaded = load(path)
    assert loaded.network.size == VIT_SIZES["vit_tiny"] and loaded.image_size == 16 and loaded.path == path
    notes = " ".join(loaded.notes)
    for told in ("how many heads there are: 3", "position embeddings are its own", "does not say which encoder"):
        assert told in notes
    expected = model.forward_features((crops(2) / 255 - MEAN) / STD)
    torch.testing.assert_close(loaded.network(crops(2)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_token": True, "global_pool": "token"}, r"unexpected cls_token \(1, 1, 192\)"),
        ({"reg_tokens": 4, "no_embed_class": True}, r"unexpected reg_token \(1, 4, 192\)"),
        ({"init_values": 0.1}, r"unexpected blocks\.0\.ls1\.gamma \(192,\).*; and 16 more"),
        ({"qk_norm": True}, r"unexpected blocks\.0\.attn\.q_norm\.weight \(64,\)"),
        ({"fc_norm": True}, r"unexpected fc_norm\.weight \(192,\)"),
        ({"pre_norm": True}, r"unexpected norm_pre\.weight \(192,\)"),
        ({"num_classes": 5}, r"unexpected head\.weight \(5, 192\)"),
        ({"qkv_bias": False}, r"lacks blocks\.0\.attn\.qkv\.bias \(576,\)"),
        ({"in_chans": 1}, r"patch_embed\.proj\.weight is \(192, 1, 4, 4\) and should be \(192, 3, 4, 4\)"),
        ({"img_size": (16, 24)}, r"pos_embed \(1, 24, 192\) has 24 patches, which is no square grid"),
        ({"depth": 11, "num_heads": 6}, "weights do not show the number of heads"),
    ],
)
def test_what_an_encoder_of_ours_does_not_have_is_named(tmp_path, arguments, message):
    path = tmp_path / "model.pth"
    torch.save(timm_model(**arguments).state_dict(), path)
    with pytest.raises(ValueError, match=rf"cannot load .*model\.pth as the weights of a vision .*: .*{message}"):
        load(path)


@pytest.mark.parametrize("content", [{"optimizer": {"lr": 1}}, [1, 2], {}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"cannot load .*model\.pth .*: it holds no weights by name, but "):
        load(tmp_path / "model.pth")


@pytest.fixture
def named(monkeypatch):
    """timm.create_model as if its only pretrained model were this one."""
    import timm

    def name(model, **config):
        model.pretrained_cfg = config
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: model)

    return name


@torch.no_grad()
def test_a_model_of_timm_by_name_with_timms_own_heads(named):
    model = timm_model(num_heads=6)
    named(model, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    loaded = load("timm:vit_anything")
    assert loaded.network.size.heads == 6 and str(loaded.path) == "timm:vit_anything"
    assert "does not say which encoder it holds" in loaded.notes[-1] and len(loaded.notes) == 2
    expected = model.forward_features((crops(2) / 255 - MEAN) / STD)
    torch.testing.assert_close(loaded.network(crops(2)), expected, rtol=0, atol=1e-4)


def test_what_weights_do_not_show_is_told_or_refused(named):
    from timm.layers import LayerNorm
    from timm.models.vision_transformer import ResPostBlock

    named(timm_model(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert load("timm:a").notes[0].startswith("warning: timm normalizes its pixels with mean (0.5, 0.5, 0.5)")
    named(timm_model(norm_layer=lambda width, **options: LayerNorm(width, eps=1e-5)))
    assert "add 1e-05 to the variance" in load("timm:a").notes[0]
    named(timm_model(act_layer="gelu_tanh"))
    with pytest.raises(ValueError, match=r"its activation is .* and ours is the exact GELU"):
        load("timm:a")
    named(timm_model(block_fn=ResPostBlock, init_values=None))
    with pytest.raises(ValueError, match="its blocks are ResPostBlock, and ours are pre-norm"):
        load("timm:a")
    named(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="it is a Linear of timm; wants its VisionTransformer"):
        load("timm:a")


def test_weights_that_cannot_be_had_and_timm_that_is_missing(monkeypatch):
    with pytest.raises(ValueError, match="timm gives no weights of vit_of_nobody: Unknown model"):
        load("timm:vit_of_nobody")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm not installed; get it with: pip install 'ijepa-scale\[export\]'"):
        load("timm:vit_of_nobody")


def test_a_folder_that_timm_cannot_make_a_model_of(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_of_nobody", "pretrained_cfg": {}}')
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"timm cannot make the model of .*config\.json: Unknown model"):
        load(tmp_path)
