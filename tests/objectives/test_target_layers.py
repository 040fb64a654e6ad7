"""Targets from several layers: against a plain loop over blocks that hooks look at, and whole runs."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import load
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models import vit as vit_module
from ijepa_scale.models.blocks import ViTSize, recompute
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.ijepa import IJepa
from tests.end_to_end.runs import ROUNDING, Runs, steps_of
from tests.objectives.test_ijepa import IMAGE, PATCH, PATCHES, PREDICTOR, images_of, random_masks

ENCODER = ViTSize(width=24, depth=4, heads=3, mlp_width=40)


def tiny_model(layers, kind="smooth_l1"):
    encoders = [VisionTransformer(ENCODER, image_size=IMAGE, patch_size=PATCH) for _ in range(2)]
    out_width = max(1, len(layers)) * ENCODER.width
    predictor = Predictor(PREDICTOR, encoder_width=ENCODER.width, out_width=out_width, grid=encoders[0].grid)
    model = IJepa(encoders[0], predictor, encoders[1], loss_kind=kind, target_layers=layers).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def plain_loss(model, images, context, blocks, layers, kind):
    """Whole outputs of all blocks, as hooks see them, and one target token after another."""
    encoder, seen = model.target_encoder, []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone())) for block in encoder.blocks
    ]
    with torch.no_grad():
        for image in images:  # one after the other: each block's output once an image
            encoder(image[None])
    for hook in hooks:
        hook.remove()
    outputs = [torch.stack(seen[block :: ENCODER.depth]) for block in range(ENCODER.depth)]
    outputs[-1] = F.layer_norm(outputs[-1], (ENCODER.width,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    masks = pack_masks(context, blocks, PATCHES)
    pred = iter(model.predictor(model.context_encoder(images, masks.context), masks))
    errors = []
    for image, of_image in enumerate(blocks):
        for patch in (patch for block in of_image for patch in block):
            answer = next(pred)
            for place, layer in enumerate(layers):
                target = outputs[layer - 1][image, patch]
                target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
                error = answer[place * ENCODER.width : (place + 1) * ENCODER.width] - target
                small = 0.5 * error**2
                errors.append(
                    torch.where(error.abs() < 1, small, error.abs() - 0.5) if kind == "smooth_l1" else error**2
                )
    assert next(pred, None) is None
    return torch.stack(errors).mean()


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("layers, tokens", [([1, 2, 4], 4096), ([2, 3], 20), ([1], 4096), ([4], 20)])
def test_loss_and_gradients_are_those_of_a_plain_loop(layers, kind, tokens, monkeypatch):
    """tokens: that a CPU encodes at once: 20 are an image at a time."""
    monkeypatch.setattr(vit_module, "CPU_TOKENS", tokens)
    model, images = tiny_model(layers, kind), images_of(3)
    context, blocks = random_masks(1, 3, 2, 4)
    recompute(model.context_encoder.blocks, 2)
    loss = model(images, pack_masks(context, blocks, PATCHES))["loss"]
    expected = plain_loss(model, images, context, blocks, layers, kind)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads, others = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for name, ours, theirs in zip(trained, grads, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_the_last_layer_alone_is_the_default_to_the_bit():
    images, masks = images_of(3), pack_masks(*random_masks(1, 3, 2, 4), PATCHES)
    losses = [tiny_model(layers)(images, masks)["loss"] for layers in ((), (4,))]
    assert torch.equal(*losses) and not torch.equal(losses[0], tiny_model([3])(images, masks)["loss"])


@pytest.mark.parametrize(
    "given, depth, layers",
    [
        ('""', 6, (6,)),
        ("[]", 6, (6,)),
        ("[2, 4, 6]", 6, (2, 4, 6)),
        ("[3]", 6, (3,)),
        ("5", 6, (5,)),
        ("every_4", 12, (4, 8, 12)),
        ("every_4", 6, (2, 6)),
        ("every_1", 3, (1, 2, 3)),
        ("every_9", 6, (6,)),
    ],
)
@pytest.mark.parametrize("typed", [False, True])
def test_which_layers_are_meant(given, depth, layers, typed, tmp_path):
    """In a file and on the command line."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{depth: {depth}}}\n" + ("" if typed else f"loss: {{target_layers: {given}}}"))
    objective = build.build_ijepa(load_config(path, [f"loss.target_layers={given}"] if typed else []))
    objective.check()
    assert objective.layers == layers
    assert objective.architecture()["target_layers"] == list(layers)
    with torch.device("meta"):
        assert objective.build().predictor.predictor_proj.out_features == len(layers) * 1280


@pytest.mark.parametrize(
    "given", ["[0]", "[2, 2]", "[4, 2]", "[-1]", "[1.5]", "[true]", "0", "every_0", "every_x", "last", "[[1]]", "[two]"]
)
def test_what_names_no_layers_is_refused(given, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"loss: {{target_layers: {given}}}")
    with pytest.raises(
        ValueError, match=r"loss.target_layers must be block numbers counted from 1, ascending"
    ) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_block_that_is_not_there_is_refused():
    objective = build.build_ijepa(load_config("tiny", ["loss.target_layers=[2, 7]"]))
    with pytest.raises(
        ValueError, match=r"loss.target_layers names block 7, and the encoder has 6; use numbers from 1"
    ):
        objective.check()


LAYERS = ("loss.target_layers=[1, 2]", "optimization.stop_at_step=4")


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    return Runs(small_config, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    runs(folder, *LAYERS, ranks=1)
    return folder


def test_a_run_keeps_to_its_layers_and_its_predictor_is_exported(runs, alone, tmp_path):
    predictor = load(alone, "predictor").network
    assert predictor.predictor_proj.out_features == 2 * predictor.predictor_embed.in_features == 64
    export(str(alone), tmp_path / "out", form="safetensors")
    again = load(tmp_path / "out", "predictor").network.state_dict()
    assert all(torch.equal(again[name], value) for name, value in predictor.state_dict().items())
    (ended,) = runs(alone, "loss.target_layers=[2]", "--allow-changes", ranks=1, code=2)
    assert "another architecture: target_layers [1, 2] there, [2] here" in ended.output
    (ended,) = runs(tmp_path / "from", f"model.init_from={alone}", "optimization.stop_at_step=1", ranks=1)
    assert "predictor fresh (that one is another: predictor_proj.weight (64, 16) there, (32, 16) here)" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("options", [(), ("engine.activation_checkpointing=full",), ("engine.compile=true",)])
def test_it_learns_alike_at_every_stage(runs, alone, stage, options, tmp_path):
    runs(tmp_path / "run", *LAYERS, f"engine.zero_stage={stage}", *options)
    ours, theirs = steps_of(tmp_path / "run"), steps_of(alone)
    assert len(ours) == 4 and ours[0]["loss"] != ours[3]["loss"]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], abs=ROUNDING), key
