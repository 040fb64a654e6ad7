import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale import build
from ijepa_scale.benchmark.dense_baseline import DenseJepa, DenseMasks
from ijepa_scale.config import PretrainConfig
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.attention import packed_attention_reference
from ijepa_scale.models.attention_backends import BACKENDS
from ijepa_scale.models.blocks import ViTSize, recompute
from ijepa_scale.models.initial import initial_weight
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.ijepa import IJepa
from ijepa_scale.objectives.regularization import of_one_rank, variance_covariance

IMAGE, PATCH, PATCHES = 16, 4, 16
ENCODER = ViTSize(width=24, depth=2, heads=3, mlp_width=40)
PREDICTOR = ViTSize(width=16, depth=2, heads=2, mlp_width=28)


def tiny_model(loss_kind="smooth_l1", dtype=torch.float64, seed=0):
    """No two parameters alike, the target encoder's included."""
    encoders = [VisionTransformer(ENCODER, image_size=IMAGE, patch_size=PATCH) for _ in range(2)]
    predictor = Predictor(PREDICTOR, encoder_width=ENCODER.width, grid=encoders[0].grid)
    model = IJepa(encoders[0], predictor, encoders[1], loss_kind=loss_kind).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model


def images_of(batch, seed=0):
    return torch.randint(256, (batch, 3, IMAGE, IMAGE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def random_masks(seed, images, blocks, block_size):
    rng = np.random.default_rng(seed)
    context = [np.sort(rng.choice(PATCHES, rng.integers(1, 12), replace=False)) for _ in range(images)]
    targets = [[rng.choice(PATCHES, block_size, replace=False) for _ in range(blocks)] for _ in range(images)]
    return context, targets


class Naive:
    """The method on one image at a time, in plain operations on a dict of weights."""

    def __init__(self, model):
        self.weights = model.state_dict(keep_vars=True)

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def block(self, x, name, heads):
        query, key, value = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=1)
        mixed = []
        for columns in torch.arange(x.shape[1]).chunk(heads):
            scores = query[:, columns] @ key[:, columns].T / len(columns) ** 0.5
            mixed.append(F.softmax(scores, dim=1) @ value[:, columns])
        x = x + self.linear(torch.cat(mixed, dim=1), f"{name}.attn.proj")
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return x + self.linear(hidden, f"{name}.mlp.fc2")

    def encode(self, image, patches, encoder):
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
        pixels = (image.double() / 255 - mean) / std
        kernel, bias = (self.weights[f"{encoder}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        rows = []
        for patch in patches:
            top, left = patch // 4 * PATCH, patch % 4 * PATCH
            window = pixels[:, top : top + PATCH, left : left + PATCH]
            rows.append((kernel * window).sum((1, 2, 3)) + bias + self.weights[f"{encoder}.pos_embed"][0, patch])
        x = torch.stack(rows)
        for i in range(ENCODER.depth):
            x = self.block(x, f"{encoder}.blocks.{i}", ENCODER.heads)
        return self.norm(x, f"{encoder}.norm")

    def predict(self, context_tokens, context_patches, block):
        positions = self.weights["predictor.predictor_pos_embed"][0]
        context = self.linear(context_tokens, "predictor.predictor_embed") + positions[context_patches]
        queries = self.weights["predictor.mask_token"][0] + positions[block]
        x = torch.cat([context, queries])
        for i in range(PREDICTOR.depth):
            x = self.block(x, f"predictor.predictor_blocks.{i}", PREDICTOR.heads)
        return self.linear(self.norm(x, "predictor.predictor_norm"), "predictor.predictor_proj")[len(context_patches) :]

    def loss(self, images, context, targets, kind):
        errors = []
        for image, patches, blocks in zip(images, context, targets, strict=True):
            with torch.no_grad():
                whole = self.encode(image, range(PATCHES), "target_encoder")
                centred = whole - whole.mean(1, keepdim=True)
                whole = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            seen = self.encode(image, patches.tolist(), "context_encoder")
            for block in blocks:
                difference = (self.predict(seen, patches, block) - whole[block]).abs()
                small = 0.5 * difference**2
                error = torch.where(difference < 1, small, difference - 0.5) if kind == "smooth_l1" else difference**2
                errors.append(error)
        return torch.stack(errors).mean()


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("images, blocks, block_size", [(3, 4, 4), (1, 1, 1), (2, 2, 16)])
def test_loss_and_every_gradient_match_one_image_at_a_time(kind, images, blocks, block_size):
    model, pixels = tiny_model(kind), images_of(images)
    context, targets = random_masks(images, images, blocks, block_size)
    loss = model(pixels, pack_masks(context, targets, PATCHES))["loss"]
    expected = Naive(model).loss(pixels, context, targets, kind)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("target_encoder.")}
    grads = torch.autograd.grad(loss, list(trained.values()))
    expected_grads = torch.autograd.grad(expected, list(trained.values()))
    for name, ours, theirs in zip(trained, grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def autocast_outcome(model, masks, pixels, **how):
    """The loss, every gradient, and what the target encoder gives without them."""
    with torch.autocast("cpu", **how):
        loss = model(pixels, masks)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        with torch.no_grad():
            again = model(pixels, masks)
    loss.backward()
    assert (again["loss"] if isinstance(again, dict) else again).item() == pytest.approx(loss.item(), rel=2e-2)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return loss.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recomputed", [0, 1])
def test_under_autocast_it_is_as_exact_as_plain_modules(dtype, recomputed):
    """Which use no operation in place: the dense baseline, also beside itself in fp32."""
    model, pixels = tiny_model(dtype=torch.float32), images_of(6)
    context, targets = random_masks(1, 6, 4, 4)
    shortest = min(part.size for part in context)  # the baseline is dense
    masks = pack_masks([part[:shortest] for part in context], targets, PATCHES)
    dense = DenseJepa(model)
    exact_loss, exact = autocast_outcome(DenseJepa(model), DenseMasks.of(masks), pixels, enabled=False)
    dense_loss, plain = autocast_outcome(dense, DenseMasks.of(masks), pixels, dtype=dtype)
    recompute(model.context_encoder.blocks, recomputed)
    recompute(model.predictor.predictor_blocks, recomputed)
    loss, ours = autocast_outcome(model.train(), masks, pixels, dtype=dtype)
    assert loss.dtype == torch.float32 and ours.keys() == plain.keys() == exact.keys()
    unit = torch.finfo(dtype).eps
    assert abs(loss - exact_loss) <= 2 * abs(dense_loss - exact_loss) + unit * exact_loss
    error = sum((ours[name] - exact[name]).square().sum() for name in exact).sqrt()
    allowed = sum((plain[name] - exact[name]).square().sum() for name in exact).sqrt()
    size = sum(exact[name].square().sum() for name in exact).sqrt()
    assert 0 < error <= 1.5 * allowed < 20 * unit * size
    whole = model.target_encoder.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        parts = whole(pixels)
    torch.testing.assert_close(parts, whole(pixels).detach(), rtol=20 * unit, atol=20 * unit)


def test_terms_against_collapse_are_not_lowered_by_autocast():
    tokens, patches = torch.randn(40, 24), torch.arange(40) % 8
    expected = variance_covariance(tokens, patches, 8, of_one_rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert variance_covariance(tokens, patches, 8, of_one_rank) == expected


def test_a_model_can_be_copied_pickled_and_saved(tmp_path):
    model = tiny_model(dtype=torch.float32)
    try:
        model.context_encoder.attend = BACKENDS["torch_varlen"].load()
        pickle.loads(pickle.dumps(model))
    except ImportError:
        assert not torch.backends.cuda.is_flash_attention_available()
    model.context_encoder.attend = partial(packed_attention_by, packed_attention_reference)
    masks, pixels = pack_masks(*random_masks(0, 3, 2, 4), PATCHES), images_of(3)
    expected = model(pixels, masks)["loss"]
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in copies:
        assert torch.equal(other(pixels, masks)["loss"], expected)


def packed_attention_by(definition, qkv, sequences):
    return definition(qkv, sequences)


def test_the_target_encoder_gets_no_gradient():
    model, pixels = tiny_model(), images_of(2)
    masks = pack_masks(*random_masks(0, 2, 2, 4), PATCHES)
    model(pixels, masks)["loss"].backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("target_encoder.")
        assert parameter.requires_grad == (not frozen)
        assert (parameter.grad is None) == frozen
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if not n.startswith("target_encoder."))


def test_micro_batches_of_equal_blocks_average_to_the_whole():
    """So accumulation does not change the loss."""
    model, pixels = tiny_model(), images_of(4)
    context, targets = random_masks(3, 4, 3, 5)
    whole = model(pixels, pack_masks(context, targets, PATCHES))["loss"]
    parts = [
        model(pixels[i : i + 2], pack_masks(context[i : i + 2], targets[i : i + 2], PATCHES))["loss"] for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_update_target(momentum):
    model = tiny_model(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.update_target(momentum)
    for name, tensor in model.state_dict().items():
        expected = before[name].double()
        if name.startswith("target_encoder.") and name in dict(model.named_parameters()):
            source = before[name.replace("target_encoder.", "context_encoder.")].double()
            expected = momentum * expected + (1 - momentum) * source
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(tensor, before[name]) == (momentum == 1.0)
        else:
            assert torch.equal(tensor, before[name])
    assert all(p.grad_fn is None and not p.requires_grad for p in model.target_encoder.parameters())


def test_twins_have_the_same_names():
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    pairs = [(names[source], names[target]) for source, target in model.twins()]
    assert pairs == [(name, name.replace("context_", "target_")) for name in names.values() if "context_" in name]


def test_bf16_loss_is_fp32_and_near_the_exact_one():
    pixels, masks = images_of(4), pack_masks(*random_masks(5, 4, 4, 4), PATCHES)
    exact = tiny_model()(pixels, masks)["loss"]
    loss = tiny_model().bfloat16()(pixels, masks)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


WEIGHT = "context_encoder.blocks.0.mlp.fc1.weight"


def test_an_initial_weight_is_a_function_of_name_shape_and_seed():
    shape = torch.Size([300, 500])
    weight = initial_weight(WEIGHT, shape, 0)
    torch.manual_seed(1234)  # the global generator plays no part
    assert torch.equal(initial_weight(WEIGHT, shape, 0), weight)
    objective = build.build_ijepa(PretrainConfig(seed=0))
    assert torch.equal(objective.initial_weight(WEIGHT.replace("context", "target"), shape), weight)
    others = [initial_weight(WEIGHT, shape, 1), initial_weight(WEIGHT.replace("0", "1"), shape, 0)]
    for other in others:
        assert abs(np.corrcoef(other.flatten(), weight.flatten())[0, 1]) < 0.02
    assert weight.dtype == torch.float32 and weight.device.type == "cpu"


@pytest.mark.parametrize("shape", [(300, 500), (1, 1, 100_000), (128, 3, 14, 14)])
def test_matrices_are_normal_with_std_0_02(shape):
    weight = initial_weight("predictor.mask_token", torch.Size(shape), 0).double().flatten() / 0.02
    count = weight.numel()
    assert abs(weight.mean()) < 5 / count**0.5
    assert abs(weight.square().mean() - 1) < 5 * (2 / count) ** 0.5
    assert abs((weight.abs() < 0.6744898).double().mean() - 0.5) < 5 * 0.5 / count**0.5  # the quartiles of a normal
    assert 3.5 < weight.abs().max() < 6


def test_vectors():
    assert torch.equal(initial_weight("context_encoder.norm.weight", torch.Size([5]), 0), torch.ones(5))
    assert torch.equal(initial_weight("context_encoder.norm.bias", torch.Size([5]), 0), torch.zeros(5))
    assert torch.equal(initial_weight("predictor.predictor_proj.bias", torch.Size([5]), 3), torch.zeros(5))
