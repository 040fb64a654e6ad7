"""CAE against one image at a time in float64, in plain operations on a dict of weights."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.blocks import ViTSize, recompute
from ijepa_scale.objectives.cae import CaeObjective
from ijepa_scale.objectives.masks import HiddenMasks
from tests.objectives.test_flops import counted, images_of
from tests.objectives.test_ijepa import Naive
from tests.objectives.test_mae import pixels_of, random_model
from tests.processes import ROOT

ALIGNMENT = 0.7
OBJECTIVE = CaeObjective(
    encoder=ViTSize(width=24, depth=2, heads=3, mlp_width=40),
    regressor_depth=2,
    decoder_depth=1,
    alignment=ALIGNMENT,
    image_size=16,
    patch_size=4,
    draw_masks=HiddenMasks(PatchGrid(4, 4), 6, in_blocks=True),
)


class NaiveCae(Naive):
    """Its encode(), block(), linear() and norm() are those that I-JEPA is held to."""

    def regress(self, seen, seen_patches, hidden_patches):
        positions, size = self.weights["regressor.pos_embed"][0], OBJECTIVE.encoder
        x = self.weights["regressor.mask_token"][0].expand(len(hidden_patches), -1)
        for i in range(OBJECTIVE.regressor_depth):
            name = f"regressor.blocks.{i}"
            weights, biases = (self.weights[f"{name}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
            of_seen, of_hidden = self.norm(seen, f"{name}.norm1"), self.norm(x, f"{name}.norm1")
            query = (of_hidden + positions[hidden_patches]) @ weights[0].T + biases[0]
            places = torch.cat([positions[seen_patches], positions[hidden_patches]])
            value = torch.cat([of_seen, of_hidden])
            key, value = (value + places) @ weights[1].T + biases[1], value @ weights[2].T + biases[2]
            mixed = []
            for columns in torch.arange(size.width).chunk(size.heads):
                scores = query[:, columns] @ key[:, columns].T / len(columns) ** 0.5
                mixed.append(F.softmax(scores, dim=1) @ value[:, columns])
            x = x + self.linear(torch.cat(mixed, dim=1), f"{name}.attn.proj")
            hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
            x = x + self.linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.mlp.fc2")
        return self.norm(x, "regressor.norm")

    def decode(self, latents, patches):
        x = latents + self.weights["decoder.pos_embed"][0, patches]
        for i in range(OBJECTIVE.decoder_depth):
            x = self.block(x, f"decoder.blocks.{i}", OBJECTIVE.encoder.heads)
        return self.linear(self.norm(x, "decoder.norm"), "decoder.proj")

    def loss(self, images, shown):
        """(loss, pixels, alignment), means over all images, which hide as many patches."""
        pixels, alignment = [], []
        for image, masks in zip(images, shown, strict=True):
            seen, hidden = (torch.from_numpy(part).long() for part in (masks.seen, masks.hidden[0]))
            with torch.no_grad():
                target = self.encode(image, hidden.tolist(), "context_encoder")
            latents = self.regress(self.encode(image, seen.tolist(), "context_encoder"), seen, hidden)
            alignment.append((latents - target).square().mean())
            mean, std = (
                torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
                for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            )
            whole = (image.double() / 255 - mean) / std
            corners = [(patch // 4 * 4, patch % 4 * 4) for patch in hidden.tolist()]
            rows = torch.stack([whole[:, top : top + 4, left : left + 4].flatten() for top, left in corners])
            rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True) + 1e-6).sqrt()
            pixels.append((self.decode(latents, hidden) - rows).square().mean())
        mean_pixels, mean_alignment = torch.stack(pixels).mean(), torch.stack(alignment).mean()
        return mean_pixels + ALIGNMENT * mean_alignment, mean_pixels, mean_alignment


@pytest.mark.parametrize("images, recomputed", [(3, 0), (1, 1)])
def test_loss_terms_and_every_gradient_match_one_image_at_a_time(images, recomputed):
    model, pixels, masks = random_model(OBJECTIVE), pixels_of(images), OBJECTIVE.draw_masks(5, range(images))
    for network in (model.context_encoder, model.regressor, model.decoder):
        recompute(network.blocks, recomputed)
    found = model(pixels, masks)
    expected = NaiveCae(model).loss(pixels, OBJECTIVE.shown(masks))
    for name, value in zip(("loss", "pixels", "alignment"), expected, strict=True):
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name
        assert found[name].requires_grad == (name == "loss")
    trained = dict(model.named_parameters())
    grads, expected_grads = (torch.autograd.grad(loss, list(trained.values())) for loss in (found["loss"], expected[0]))
    for name, ours, theirs in zip(trained, grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs.abs().max() > 1e-4, name


def test_no_gradient_reaches_the_encoder_from_hidden_patches():
    """Where none comes back through the regressor, there is none: what it is aligned with is a constant."""
    model, masks = random_model(OBJECTIVE), OBJECTIVE.draw_masks(5, range(2))
    regress = model.regressor.forward
    model.regressor.forward = lambda seen, masks: regress(seen.detach(), masks)
    model(pixels_of(2), masks)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.context_encoder.parameters())
    assert model.regressor.mask_token.grad.abs().max() > 0


SMALL = ["model.width=48", "model.depth=3", "cae.regressor_depth=2", "cae.decoder_depth=1"]


@pytest.mark.parametrize("policy, ratio", [("none", 0.5), ("none", 0.3), ("predictor", 0.5), ("full", 0.5)])
def test_hardware_flops_are_those_of_the_counter(policy, ratio):
    overrides = [*SMALL, f"cae.mask_ratio={ratio}", f"engine.activation_checkpointing={policy}"]
    config = load_config(ROOT / "configs" / "cae_small.yaml", overrides)
    objective = build.build_objective(config)
    masks = objective.draw_masks(0, range(5))
    done = objective.done(masks)
    assert done["hardware_flops"] == counted(build.build_model(config), masks, images_of(config, 5))
    assert done["model_flops"] == pytest.approx(5 * sum(objective.expected([masks]).flops.values()))
    assert done["model_flops"] < done["hardware_flops"] < (1.03 if policy == "none" else 1.4) * done["model_flops"]


def test_what_the_regressor_keeps_for_the_backward_is_about_what_is_said():
    """In fp32, twice the bytes of bf16."""
    model, masks, kept = random_model(OBJECTIVE, torch.float32), OBJECTIVE.draw_masks(5, range(8)), {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latents = model.regressor(torch.randn(8 * 10, 24, requires_grad=True), masks)
    said = 8 * 2 * OBJECTIVE.expected([masks]).kept_bytes["regressor"]
    assert said == pytest.approx(sum(kept.values()), rel=0.3) and latents.shape == (8 * 6, 24)
