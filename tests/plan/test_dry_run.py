"""--dry-run, for every config there is."""

import gc

import pytest
import torch
from PIL import Image

from ijepa_scale import build
from ijepa_scale.config import OptimizationConfig, load_config
from ijepa_scale.engine import distributed, zero
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.plan import dry_run as module
from ijepa_scale.plan.dry_run import dry_run, state_bytes
from tests.processes import ROOT, assert_all, run_ranks

CONFIGS = sorted(set(ROOT.glob("configs/*.yaml")) - set(ROOT.glob("configs/compare_*.yaml")))
# Published sizes of context encoder and predictor, in millions (arXiv:2301.08243 and the released code).
MILLIONS = {"vitb16": (86, 11), "vitl16": (303, 22), "vith14": (631, 22), "vitg16": (1011, 30), "vitgg14": (1843, 30)}


@pytest.fixture
def few_layouts(monkeypatch):
    """Drawn for means of tokens, which most of these tests do not read."""
    monkeypatch.setattr(module, "SAMPLED_STEPS", 5)


@pytest.mark.usefixtures("few_layouts")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_says_what_it_amounts_to(path):
    text = dry_run(load_config(path))
    for word in ("parameters", "tokens", "FLOPs", "steps"):
        assert word in text
    assert "unknown" not in text
    head = path.read_text().split("\ndata:")[0]
    assert "launch/pretrain.py --config configs/" + path.name in head
    if path.stem not in ("tiny", "small_images"):  # which were measured
        assert "unmeasured" in head
    if path.stem in MILLIONS:
        words = text.split("parameters")[1].replace(",", "").split()
        encoder, predictor = float(words[2]), float(words[5])
        assert encoder == pytest.approx(MILLIONS[path.stem][0], abs=1) and predictor == pytest.approx(
            MILLIONS[path.stem][1], abs=1
        )


def test_vith14_costs_what_was_measured_for_packed_tokens():
    config = load_config(CONFIGS[[path.stem for path in CONFIGS].index("vith14")])
    objective = build.build_ijepa(config)
    tokens = Counts.mean([Counts.of(objective.draw_masks(step, range(16))) for step in range(100)])
    assert tokens.context == pytest.approx(108.4, abs=2)
    assert objective.flops.model(tokens) == pytest.approx(841e9, rel=0.02)


@pytest.mark.parametrize(
    "policy, encoder, predictor",
    [("none", 17.2, 10.8), ("predictor", 17.2, 0.7), ("every_2", 9.1, 0.7), ("full", 1.1, 0.7)],
)
def test_vith14_keeps_the_activations_that_its_tokens_amount_to(policy, encoder, predictor):
    """128 images of 109 context tokens, a little over 32 bytes x width for each of them and each layer."""
    path = CONFIGS[[path.stem for path in CONFIGS].index("vith14")]
    text = dry_run(load_config(path, [f"engine.activation_checkpointing={policy}"]))
    words = text.split("activations")[1].split()
    assert float(words[8]) == pytest.approx(encoder, rel=0.02, abs=0.06)
    assert float(words[11]) == pytest.approx(predictor, rel=0.02, abs=0.06)
    assert f"128 images (engine.activation_checkpointing={policy})" in text


def test_dry_run_needs_a_number_of_images_or_steps(few_layouts, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: vit_tiny, patch_size: 16}")
    assert "give data.num_images" in dry_run(load_config(path))
    assert "1,000 (" not in dry_run(load_config(path, ["optimization.max_steps=1000"]))
    assert "1,000 of" in dry_run(load_config(path, ["optimization.max_steps=1000"]))
    with pytest.raises(ValueError, match=r"fewer than optimization\.global_batch_size"):
        dry_run(load_config(path, ["data.num_images=100"]))


def storages() -> dict[int, int]:
    """Bytes of all tensors there are, by address."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    found += [one.grad for one in found if one.is_leaf and one.grad is not None]
    found += [one.ds_tensor for one in found if hasattr(one, "ds_tensor")]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}


def bytes_after_backward() -> None:
    ranks = distributed.start()
    config = load_config(ROOT / "configs" / "tiny.yaml", [])
    objective = build.build_ijepa(config)
    images = torch.randint(256, (2, 3, 64, 64)).to(torch.uint8)
    masks = objective.draw_masks(0, range(2))
    for zero_stage in (1, 2, 3):
        before = storages()
        settings = zero.deepspeed_config(
            zero_stage=zero_stage, precision="bf16", micro_batch_size=2, accumulation_steps=1
        )
        engine, ema = build.build_engine(
            objective,
            settings,
            optimization=OptimizationConfig(),
            initial=lambda name, shape: 0.02 * torch.randn(shape),
        )
        for step in range(2):
            engine.backward(engine(images, masks)["loss"])
            if not step:
                engine.step()
                ema.update()
        found = sum(size for at, size in storages().items() if at not in before)
        encoder, predictor = (
            sum(getattr(p, "ds_numel", p.numel()) for p in part.parameters())
            for part in objective.trained(engine.module).values()
        )
        whole, cut, _ = state_bytes(zero_stage, trained=encoder + predictor, averaged=encoder)
        expected = whole + cut / ranks.world_size
        gathered = 2 * (encoder + predictor) if zero_stage == 3 else 0  # weights at work, and small ones: at the most
        assert 0.98 * expected < found < 1.02 * expected + gathered, (zero_stage, found / 1e6, expected / 1e6)
        del engine, ema  # else their memory, known before, may become the next stage's
    ranks.close()


@pytest.mark.slow
def test_state_is_what_lies_there_after_a_backward(tmp_path):
    assert_all(run_ranks(bytes_after_backward, 2, tmp_path))


def plan(*overrides):
    return dry_run(load_config(CONFIGS[[path.stem for path in CONFIGS].index("small_images")], list(overrides)))


def test_dry_run_reads_the_source(few_layouts, tmp_path):
    for split, count in (("train", 130), ("val", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / split / f"{i}.png")
    assert f"images         130 in {tmp_path}:train\n" in plan(f"data.source={tmp_path}")
    assert f"130 in {tmp_path}:train\n" in plan(f"data.source={tmp_path}", "data.streaming=true")
    assert f"130 in {tmp_path}:train; 20,000 in scenes:train\n" in plan(
        f"data.source=[{{path: {tmp_path}}}, {{path: scenes}}]"
    )
    with pytest.raises(ValueError, match=r"3 images, fewer than optimization\.global_batch_size 128"):
        plan(f"data.source={tmp_path}", "data.split=val")


def test_dry_run_says_what_it_cannot_know(few_layouts, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    nobody = "http://127.0.0.1:1/{000..001}.tar"  # and asks nobody
    elsewhere = "is no file or folder here: taken for a Hub id or URL, and not looked up"
    assert f"images         someone/pictures {elsewhere}\n" in plan("data.source=someone/pictures")
    text = plan(f"data.source='{nobody}'", "data.streaming=true", "data.num_images=500", "optimization.max_steps=0")
    assert f"{elsewhere}; 500 by data.num_images\n" in text and "(8 epochs of 3)" in text
    with pytest.raises(ValueError, match="how long the stream is cannot be known"):
        plan(f"data.source='{nobody}'", "data.streaming=true", "optimization.max_steps=0")
    assert "images         data.source is not set, and training needs it\n" in plan()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.source=/nowhere/at/all"], "there is no folder '/nowhere/at/all'"),
        (["data.source=/nowhere/at/all", "optimization.max_steps=0"], "there is no folder '/nowhere/at/all'"),
        (["data.source=/nowhere/at/all", "data.streaming=true", "data.num_images=500"], "there is no folder"),
        (["data.source=[{path: scenes}, {path: /nowhere}]"], "there is no folder '/nowhere'"),
        (["data.source='http://127.0.0.1:1/{0003..0000}.tar'", "data.streaming=true"], "braces hold a range"),
        (["data.source='http://127.0.0.1:1/{000..001}.tar'"], "streamed only"),
        (["data.source='/nowhere/{000..001}.tar'", "data.streaming=true"], "/nowhere/000.tar is missing, one of 2"),
    ],
)
def test_dry_run_refuses_what_training_would(overrides, words):
    with pytest.raises(ValueError, match=words):
        plan(*overrides)
