"""--dry-run, for every config there is; its FLOPs against PyTorch's own counter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale.build import build_blocks, build_model
from ijepa_scale.config import load_config
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.plan import Tokens, count_tokens, dry_run, flops_per_image, tokens_of

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
    assert sum(flops_per_image(config, tokens).values()) == pytest.approx(841e9, rel=0.02)


def addmm_flops(onto, left, right, **_):
    """Products accumulated in place, which the counter does not know. Shapes."""
    return 2 * left[0] * left[1] * right[1]


def test_flops_agree_with_the_flop_counter():
    # Without the terms against collapse, which are no part of the count: at these widths 1% of it.
    smaller = ["model.depth=2", "predictor.depth=2", "loss.variance=0", "loss.covariance=0"]
    config = load_config(CONFIGS[[path.stem for path in CONFIGS].index("tiny")], smaller)
    model = build_model(config)
    context = [np.arange(20), np.arange(20)]
    blocks = [[np.arange(30, 42)] * 4] * 2
    masks = pack_masks(context, blocks, 64)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        model(images, masks)["loss"].backward()
    tokens = Tokens(20, 400, 12, 32, 1024, 12)
    assert tokens == tokens_of(masks)
    # The counter sees equal lengths: no padding. It counts the score product of attention's backward once more.
    assert counter.get_total_flops() / 2 == pytest.approx(sum(flops_per_image(config, tokens).values()), rel=0.02)


def test_dry_run_needs_a_number_of_images_or_steps(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: vit_tiny, patch_size: 16}")
    assert "give data.num_images" in dry_run(load_config(path))
    assert "1,000 (" not in dry_run(load_config(path, ["optimization.max_steps=1000"]))
    assert "1,000 of" in dry_run(load_config(path, ["optimization.max_steps=1000"]))
    with pytest.raises(ValueError, match=r"fewer than optimization\.global_batch_size"):
        dry_run(load_config(path, ["data.num_images=100"]))
