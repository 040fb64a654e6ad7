"""MAE against transformers.ViTMAEForPreTraining with the same weights and masks, less its class token."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.blocks import ViTSize, recompute
from ijepa_scale.objectives.mae import MaeObjective
from ijepa_scale.objectives.masks import HiddenMasks
from ijepa_scale.objectives.pixels import pixel_loss
from tests.objectives.test_flops import counted, images_of
from tests.processes import ROOT

PATCH, GRID = 4, PatchGrid(4, 4)
OBJECTIVE = MaeObjective(
    encoder=ViTSize(width=24, depth=2, heads=3, mlp_width=40),
    decoder=ViTSize(width=16, depth=2, heads=2, mlp_width=28),
    image_size=16,
    patch_size=PATCH,
    draw_masks=HiddenMasks(GRID, 12),
)


def random_model(objective, dtype=torch.float64):
    """No two parameters alike."""
    model, generator = objective.build().to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model


def pixels_of(batch):
    return torch.randint(256, (batch, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def channels_last(weights):
    """Rows of the last layer in transformers' order of a patch's pixels: row, column, channel."""
    return weights.unflatten(0, (3, PATCH, PATCH)).movedim(0, 2).flatten(0, 2)


HALVES = {  # of a block: transformers' names, ours
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ENDS = {
    "vit.embeddings.patch_embeddings.projection": "context_encoder.patch_embed.proj",
    "vit.layernorm": "context_encoder.norm",
    "decoder.decoder_embed": "decoder.predictor_embed",
    "decoder.decoder_norm": "decoder.predictor_norm",
}


def by_their_names(ours):
    """Weights or gradients of ours, by transformers' names and in its order of a patch's pixels."""
    pairs = dict(ENDS)
    for their, our, size in (
        ("vit.layers", "context_encoder.blocks", OBJECTIVE.encoder),
        ("decoder.decoder_layers", "decoder.predictor_blocks", OBJECTIVE.decoder),
    ):
        for i in range(size.depth):
            pairs |= {f"{their}.{i}.{half}": f"{our}.{i}.{HALVES[half]}" for half in HALVES}
    found = {f"{their}.{kind}": ours[f"{our}.{kind}"] for their, our in pairs.items() for kind in ("weight", "bias")}
    found["decoder.mask_token"] = ours["decoder.mask_token"]
    for kind in ("weight", "bias"):
        rows = ours[f"decoder.predictor_proj.{kind}"].unflatten(0, (3, PATCH, PATCH))
        found[f"decoder.decoder_pred.{kind}"] = rows.movedim(0, 2).flatten(0, 2)  # row, column, channel
        for their in [name.removesuffix(".mlp.fc1.bias") for name in found if name.endswith("mlp.fc1.bias")]:
            our = pairs[f"{their}.mlp.fc1"].removesuffix(".mlp.fc1")
            for part, values in zip("qkv", ours[f"{our}.attn.qkv.{kind}"].chunk(3), strict=True):
                found[f"{their}.attention.{part}_proj.{kind}"] = values
    return found


def theirs_of(model):
    """transformers' model in float64 with our weights and positions, and without its class token."""
    transformers = pytest.importorskip("transformers", minversion="5.20")  # since when layers have these names
    encoder, decoder = OBJECTIVE.encoder, OBJECTIVE.decoder
    config = transformers.ViTMAEConfig(
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.heads,
        intermediate_size=encoder.mlp_width,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.heads,
        decoder_intermediate_size=decoder.mlp_width,
        image_size=16,
        patch_size=PATCH,
        norm_pix_loss=True,
        mask_ratio=0.75,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.ViTMAEForPreTraining(config).double()
    parameters, weights = dict(theirs.named_parameters()), by_their_names(dict(model.named_parameters()))
    positions = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert parameters.keys() - weights.keys() == {"vit.embeddings.cls_token", *positions}
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(values)
        theirs.vit.embeddings.position_embeddings[:, 1:].copy_(model.context_encoder.pos_embed)
        theirs.decoder.decoder_pos_embed[:, 1:].copy_(model.decoder.predictor_pos_embed)
    theirs.vit.embeddings.register_forward_hook(lambda module, given, out: (out[0][:, 1:], *out[1:]))
    # The decoder wants a first token, and takes one off its answer: no layer is to see it.
    theirs.decoder.register_forward_pre_hook(lambda module, given: (with_first(given[0]), *given[1:]))
    theirs.decoder.decoder_layers[0].register_forward_pre_hook(lambda module, given: (given[0][:, 1:], *given[1:]))
    theirs.decoder.decoder_pred.register_forward_hook(lambda module, given, out: with_first(out))
    return theirs


def with_first(tokens):
    return F.pad(tokens, (0, 0, 1, 0))


def test_loss_and_every_gradient_are_those_of_transformers():
    model, pixels = random_model(OBJECTIVE), pixels_of(3)
    theirs, noise = theirs_of(model), torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    kept = noise.argsort(dim=1)[:, :4].sort(dim=1).values.numpy()
    hidden = [[np.setdiff1d(np.arange(16), image)] for image in kept]
    loss = model(pixels, pack_masks(list(kept), hidden, 16))["loss"]
    mean, std = (torch.tensor(v).double()[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = theirs((pixels.double() / 255 - mean) / std, noise=noise).loss
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-6)  # their means: fp32
    loss.backward()
    expected.backward()
    gradients = by_their_names({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in theirs.named_parameters():
        if name in gradients:
            error, size = (parameter.grad - gradients[name]).abs().max(), parameter.grad.abs().max()
            assert error <= 1e-6 * size + 1e-12, name
            assert size > 1e-4 or "k_proj.bias" in name, name  # which moves all of a token's scores alike


def test_pixels_are_normalized_within_each_patch():
    """Against one patch at a time; what is flat stays finite."""
    images = pixels_of(2)
    images[1, :, :4, :4] = 7
    indices = torch.tensor([5, 16, 31])
    values = []
    for index in indices.tolist():
        row, column = index % 16 // 4 * 4, index % 4 * 4
        patch = images[index // 16, :, row : row + 4, column : column + 4].double().numpy() / 255
        patch = (patch - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
            :, None, None
        ]
        values.append((patch - patch.mean()).ravel() / (patch.std(ddof=1) ** 2 + 1e-6) ** 0.5)
    pred = torch.randn(3, 48, dtype=torch.float64)
    expected = np.square(pred.numpy() - np.stack(values)).mean()
    assert pixel_loss(pred, images, indices, 4).item() == pytest.approx(expected, rel=1e-12)
    lowered = pixel_loss(pred.bfloat16(), images, indices, 4)
    assert lowered.dtype == torch.float32 and lowered.item() == pytest.approx(expected, rel=1e-2)


def test_micro_batches_average_to_the_whole_whatever_is_recomputed():
    """Bit for bit that of the images apart, in float64 to rounding: every image hides as many patches."""
    model, pixels = random_model(OBJECTIVE), pixels_of(4)
    whole = model(pixels, OBJECTIVE.draw_masks(3, range(4)))["loss"]
    recompute(model.context_encoder.blocks, 1)
    recompute(model.decoder.predictor_blocks, 1)
    parts = [model(pixels[i : i + 2], OBJECTIVE.draw_masks(3, range(i, i + 2)))["loss"] for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


SMALL = ["model.width=48", "model.depth=3", "mae.decoder_width=24", "mae.decoder_depth=2"]


@pytest.mark.parametrize("policy, ratio", [("none", 0.75), ("none", 0.4), ("predictor", 0.75), ("full", 0.75)])
def test_hardware_flops_are_those_of_the_counter(policy, ratio):
    overrides = [*SMALL, f"mae.mask_ratio={ratio}", f"engine.activation_checkpointing={policy}"]
    config = load_config(ROOT / "configs" / "mae_small.yaml", overrides)
    objective = build.build_objective(config)
    masks = objective.draw_masks(0, range(5))
    done = objective.done(masks)
    assert done["hardware_flops"] == counted(build.build_model(config), masks, images_of(config, 5))
    assert done["context_tokens"] + done["target_tokens"] == 5 * 64 and done["target_tokens"] == 5 * round(64 * ratio)
    assert done["model_flops"] == pytest.approx(5 * sum(objective.expected([masks]).flops.values()))
    scores = 0.03 if policy == "none" else 0.4
    assert done["model_flops"] < done["hardware_flops"] < (1 + scores) * done["model_flops"]


def test_masks_are_the_same_at_any_cut_and_can_be_pickled():
    whole = pickle.loads(pickle.dumps(OBJECTIVE)).draw_masks(2, range(4, 8))
    parts = [OBJECTIVE.draw_masks(2, range(i, i + 2)) for i in (4, 6)]
    hidden = [image.hidden[0].tolist() for part in parts for image in OBJECTIVE.shown(part)]
    assert [image.hidden[0].tolist() for image in OBJECTIVE.shown(whole)] == hidden
    for image in OBJECTIVE.shown(whole):
        assert sorted([*image.seen, *image.hidden[0]]) == list(range(16)) and len(image.seen) == 4
    assert hidden != [image.hidden[0].tolist() for image in OBJECTIVE.shown(OBJECTIVE.draw_masks(3, range(4, 8)))]


@pytest.mark.parametrize("ratio", [0.001, 0.999])
def test_a_ratio_that_hides_no_patch_or_all_is_refused(ratio):
    config = load_config(ROOT / "configs" / "mae_small.yaml", [f"mae.mask_ratio={ratio}"])
    with pytest.raises(ValueError, match=rf"mae.mask_ratio {ratio} hides \d+ of 64 patches; some must be hidden"):
        build.build_objective(config)


def test_another_objective_is_no_ijepa():
    config = load_config(ROOT / "configs" / "mae_small.yaml")
    with pytest.raises(ValueError, match=r"this is of objective.name=ijepa alone, got mae"):
        build.build_ijepa(config)
