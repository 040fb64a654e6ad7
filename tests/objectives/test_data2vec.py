"""data2vec: its targets against a plain loop, its loss and gradients against one image and mask at a time."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import find, load
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.data2vec import Data2Vec, normalized_mean
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.run.records import read_records
from tests.conftest import SMALL_CONFIG
from tests.end_to_end.runs import Runs, assert_close_run, assert_same_run
from tests.objectives.test_flops import counted
from tests.objectives.test_flops import images_of as images_of_config
from tests.objectives.test_ijepa import ENCODER, IMAGE, PATCH, PATCHES, PREDICTOR, Naive, images_of

MASKS, VISIBLE = 3, 5  # an image


def tiny_model(layers, kind):
    """No two parameters alike."""
    encoders = [VisionTransformer(ENCODER, image_size=IMAGE, patch_size=PATCH) for _ in range(2)]
    predictor = Predictor(PREDICTOR, encoder_width=ENCODER.width, grid=encoders[0].grid)
    model = Data2Vec(encoders[0], predictor, encoders[1], layers=layers, loss_kind=kind).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model


def random_masks(images):
    rng = np.random.default_rng(images)
    orders = [rng.permutation(PATCHES) for _ in range(images * MASKS)]
    return [order[:VISIBLE] for order in orders], [order[VISIBLE:] for order in orders]


class Dense(Naive):
    """One image and one mask at a time, on whole grids."""

    def target(self, image, layers):
        """The mean over layers of every patch's normalized token."""
        seen = []
        self.block_outputs = seen
        self.encode(image, range(PATCHES), "target_encoder")
        outputs = [seen[layer - 1] for layer in layers]
        return sum((x - x.mean(1, keepdim=True)) / (x.var(1, False, True) + 1e-5).sqrt() for x in outputs) / len(layers)

    def block(self, x, name, heads):
        x = super().block(x, name, heads)
        self.block_outputs.append(x.detach())
        return x

    def loss(self, images, visible, hidden, layers, kind):
        losses = []
        for place, (shown, others) in enumerate(zip(visible, hidden, strict=True)):
            image = images[place // MASKS]
            target = self.target(image, layers)
            context = self.encode(image, shown.tolist(), "context_encoder")
            difference = self.predict(context, shown, others) - target[others]
            measure = F.huber_loss if kind == "smooth_l1" else F.mse_loss
            losses.append(measure(difference, torch.zeros_like(difference)))
        return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("layers", [(2,), (1, 2)])
def test_loss_and_every_gradient_match_one_mask_at_a_time(layers, kind):
    model, images = tiny_model(layers, kind), images_of(2)
    visible, hidden = random_masks(2)
    masks = pack_masks(visible, [[part] for part in hidden], PATCHES, masks_an_image=MASKS)
    loss, expected = model(images, masks)["loss"], Dense(model).loss(images, visible, hidden, layers, kind)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if name.startswith("target_encoder")]
    grads, others = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for name, ours, theirs in zip(trained, grads, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_targets_are_the_mean_of_normalized_layers(dtype):
    outputs = [(3 + (layer + 1) * torch.randn(5, 8, dtype=torch.float64)).to(dtype) for layer in range(3)]
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for output in outputs:
        for row, token in enumerate(output.double()):
            expected[row] += (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt() / 3
    found = normalized_mean(outputs)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_flops_are_those_of_the_counter(policy):
    sizes = ["model.depth=3", "model.width=48", "predictor.width=24", "predictor.depth=2", "data2vec.top_layers=2"]
    config = load_config("data2vec_small", [*sizes, f"engine.activation_checkpointing={policy}"])
    objective = build.build_objective(config)
    masks = objective.draw_masks(0, range(3))
    done = objective.done(masks)
    assert done["hardware_flops"] == counted(build.build_model(config), masks, images_of_config(config, 3))
    assert done["model_flops"] == objective.flops.model(Counts.of(masks))
    assert (done["context_tokens"], done["target_tokens"]) == (3 * 4 * 13, 3 * 4 * 51)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data2vec.mask_ratio=1"], "data2vec.mask_ratio must lie between 0 and 1, .*got 1.0"),
        (["data2vec.mask_ratio=0.999"], "data2vec.mask_ratio 0.999 leaves 0 of 64 patches visible; some must"),
        (["data2vec.top_layers=7"], "data2vec.top_layers 7 are more than the encoder's 6 blocks; use 6 or fewer"),
        (["data2vec.masks_an_image=0"], "data2vec.masks_an_image must be 1 or more, got 0"),
        (["data2vec.loss=l1"], "data2vec.loss must be smooth_l1 or l2, got 'l1'"),
        (
            ["loss.variance=0.1"],
            "the section loss is of objective.name=ijepa and this is data2vec, which takes data2vec",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build.build_objective(load_config("data2vec_small", overrides)).check()


def test_each_image_has_one_picture_of_its_first_mask():
    objective = build.build_objective(load_config("data2vec_small"))
    shown, again = (objective.shown(objective.draw_masks(0, range(count))) for count in (3, 1))
    assert len(shown) == 3 and all(len(one.hidden) == 1 for one in shown)
    assert np.array_equal(shown[0].seen, again[0].seen) and len(shown[0].seen) == 13
    assert np.array_equal(np.sort(np.concatenate([shown[2].seen, *shown[2].hidden])), np.arange(64))


def test_the_size_that_is_shipped_is_that_of_the_small_ijepa():
    ours, theirs = load_config("data2vec_small"), load_config("small_images")
    for section in ("model", "engine", "report", "predictor"):
        assert getattr(ours, section) == getattr(theirs, section)
    assert ours.data.image_size == theirs.data.image_size


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data2vec")
    own = "objective: {name: data2vec}\ndata2vec: {masks_an_image: 2, block_side: 2, top_layers: 2}\n"
    (folder / "small.yaml").write_text(re.sub(r"(?m)^mask: .*\n", "", SMALL_CONFIG % image_folder) + own)
    return Runs(folder / "small.yaml", folder)


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """A run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    options = ("logging.health_every_steps=8", "report.train_images=32", "report.test_images=16")
    runs(run, *options, "optimization.lr=3e-3", ranks=1, drawn=True)
    return run


def test_it_learns_and_its_networks_are_scored_and_exported(alone, tmp_path):
    records = read_records(alone / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    health = [record for record in records if record["kind"] == "health"]
    assert len(health) == 3 and health[-1]["drift"] > 0
    assert (alone / "report.json").is_file() and (alone / "masks.png").stat().st_size > 5000
    assert find(alone).names == ("target", "context", "predictor")
    export(str(alone), tmp_path / "out", form="safetensors")
    for network in find(alone).names:
        first, again = (load(path, network).network.state_dict() for path in (alone, tmp_path / "out"))
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_learn_alike_at_every_stage_and_a_stop_leaves_no_trace(runs, alone, tmp_path, stage):
    options = (f"engine.zero_stage={stage}", "optimization.micro_batch_size=2", "optimization.lr=3e-3")
    runs(tmp_path / "whole", *options, "engine.activation_checkpointing=full")
    assert_close_run(tmp_path / "whole", alone)
    runs(tmp_path / "stopped", *options, "optimization.stop_at_step=6")
    runs(tmp_path / "stopped", *options)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 12)
