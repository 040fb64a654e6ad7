"""--dry-run, for every config there is."""

from pathlib import Path

import pytest

from ijepa_scale.build import build_blocks, build_flops
from ijepa_scale.config import load_config
from ijepa_scale.plan import count_tokens, dry_run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# Published sizes of context encoder and predictor, in millions (arXiv:2301.08243 and the released code).
MILLIONS = {"vitb16": (86, 11), "vitl16": (303, 22), "vith14": (631, 22), "vitg16": (1011, 30), "vitgg14": (1843, 30)}


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
    tokens = count_tokens(build_blocks(config), "all")
    assert tokens.context == pytest.approx(108.4, abs=2)
    assert build_flops(config).model(tokens) == pytest.approx(841e9, rel=0.02)


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


def test_dry_run_needs_a_number_of_images_or_steps(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: vit_tiny, patch_size: 16}")
    assert "give data.num_images" in dry_run(load_config(path))
    assert "1,000 (" not in dry_run(load_config(path, ["optimization.max_steps=1000"]))
    assert "1,000 of" in dry_run(load_config(path, ["optimization.max_steps=1000"]))
    with pytest.raises(ValueError, match=r"fewer than optimization\.global_batch_size"):
        dry_run(load_config(path, ["data.num_images=100"]))
