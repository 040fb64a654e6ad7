"""--dry-run, for every config there is."""

import re

import pytest
from PIL import Image

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.objectives.flops import Counts
from ijepa_scale.plan import sampling
from ijepa_scale.plan.dry_run import dry_run
from tests.processes import ROOT

CONFIGS = sorted(set(ROOT.glob("configs/*.yaml")) - set(ROOT.glob("configs/compare_*.yaml")))
MEASURED = ("tiny", "small_images", "sketch_small", "sketch_flow_small")
# Published sizes of context encoder and predictor, in millions (arXiv:2301.08243 and the released code).
MILLIONS = {"vitb16": (86, 11), "vitl16": (303, 22), "vith14": (631, 22), "vitg16": (1011, 30), "vitgg14": (1843, 30)}


@pytest.fixture
def few_layouts(monkeypatch):
    """Drawn for means of tokens, which most of these tests do not read."""
    monkeypatch.setattr(sampling, "SAMPLED_STEPS", 5)


@pytest.mark.usefixtures("few_layouts")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_says_what_it_amounts_to(path):
    text = dry_run(load_config(path))
    for word in ("parameters", "tokens", "FLOPs", "steps"):
        assert word in text
    assert "unknown" not in text
    head = re.split(r"\n(?=[a-z])", path.read_text())[0]
    if path.stem.startswith("sketch"):
        assert "launch/train_sketch.py --checkpoint" in head
    else:
        assert "launch/pretrain.py --config configs/" + path.name in head
    if path.stem not in MEASURED:
        assert "unmeasured" in head.lower()
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
    [("none", 17.2, 10.5), ("predictor", 17.2, 0.7), ("every_2", 9.1, 0.7), ("full", 1.1, 0.7)],
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


@pytest.mark.parametrize("ranks, where, gradients", [(1, "on one GPU", 4), (16, "on each of 16 GPUs", 4 / 16)])
def test_dry_run_says_what_state_lies_on_a_gpu(ranks, where, gradients):
    """By hand, bytes a parameter: bf16 weights, fp32 masters and moments, gradients, EMA and its bf16 copy."""
    text = dry_run(load_config(CONFIGS[[path.stem for path in CONFIGS].index("vith14")]), ranks=ranks)
    trained, averaged = 653.3e6, 630.8e6
    expected = (2 + 12 / ranks + gradients) * trained + (2 + 4 / ranks) * averaged
    line = next(line for line in text.splitlines() if line.startswith("state "))
    assert where in line and float(line.split()[3]) == pytest.approx(expected / 2**30, rel=0.01)


def test_batch_min_is_sampled_in_micro_batches_as_they_are():
    """Of 128 images the shortest context is shorter than of the 16 that are drawn elsewhere."""
    path = CONFIGS[[path.stem for path in CONFIGS].index("vith14")]
    found = []
    for size in (16, 128):
        overrides = ["mask.context=batch_min", f"optimization.micro_batch_size={size}"]
        text = dry_run(load_config(path, overrides))
        found.append(float(text.split("tokens")[1].split("context ")[1].split()[0]))
    assert found[0] > found[1] + 5


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
    with pytest.raises(ValueError, match=r"3 images, fewer than optimization\.global_batch_size 64"):
        plan(f"data.source={tmp_path}", "data.split=val")


def test_dry_run_says_what_it_cannot_know(few_layouts, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    nobody = "http://127.0.0.1:1/{000..001}.tar"  # and asks nobody
    elsewhere = "is no file or folder here: taken for a Hub id or URL, and not looked up"
    assert f"images         someone/pictures {elsewhere}\n" in plan("data.source=someone/pictures")
    text = plan(f"data.source='{nobody}'", "data.streaming=true", "data.num_images=500", "optimization.max_steps=0")
    assert f"{elsewhere}; 500 by data.num_images\n" in text and "(8 epochs of 7)" in text
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


@pytest.mark.usefixtures("few_layouts")
def test_with_offload_a_gpu_has_no_optimizer_state_and_the_host_does():
    usual, offloaded = (
        dry_run(load_config(ROOT / "configs" / "vith14.yaml", [f"engine.offload_optimizer={where}"]), ranks=16)
        for where in ("none", "cpu")
    )
    line = next(line for line in offloaded.splitlines() if line.startswith("state"))
    assert "optimizer 0.00" in line and "of the host's memory" in line and "of the host's memory" not in usual
    # masters and two moments of 653 M parameters and an EMA of 631 M, fp32, on 16 ranks
    assert pytest.approx(0.60, abs=0.01) == (12 * 653e6 + 4 * 631e6) / 16 / 2**30
    host = float(re.search(r"and ([\d.]+) GiB of the host's memory", line)[1])
    assert host == pytest.approx(0.60, abs=0.05)  # and a bucket's way there and back
