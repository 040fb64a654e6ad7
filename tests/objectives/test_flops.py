"""The FLOPs of a step against PyTorch's own counter on the real model, forward and backward."""

import time

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale import build
from ijepa_scale.benchmark.step import sampled_masks
from ijepa_scale.config import load_config
from ijepa_scale.engine.device import PEAKS, device_peak, peak_flops, rates
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.models.blocks import Block
from ijepa_scale.objectives.flops import Counts
from tests.processes import ROOT

# Without the terms against collapse, which are no part of the count.
SMALL = ["loss.variance=0", "loss.covariance=0", "model.width=48", "predictor.width=24"]


def addmm_flops(onto, left, right, **_):
    """Products accumulated in place, which the counter does not know. Shapes."""
    return 2 * left[0] * left[1] * right[1]


def attention_flops(query, key, value, *_, **__):
    """Scores, and what they weigh."""
    images, heads, queries, width = query
    return 2 * images * heads * queries * key[2] * (width + value[3])


def attention_backward_flops(grad, query, key, value, *_, **__):
    """The scores again, and two products for each of the forward's two."""
    images, heads, queries, width = query
    return 2 * images * heads * queries * key[2] * (3 * width + 2 * value[3])


UNKNOWN = {  # to the counter; attention on a CPU up to torch 2.14
    torch.ops.aten.addmm_: addmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def counted(model, masks, images):
    """What the counter sees. Sequences attend by their own lengths on a CPU: there is no padding in it."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        model(images, masks)["loss"].backward()
    return counter.get_total_flops()


def images_of(config, batch):
    return torch.randint(0, 256, (batch, 3, config.data.image_size, config.data.image_size), dtype=torch.uint8)


@pytest.mark.parametrize("context", ["all", "batch_min", "12"])
@pytest.mark.parametrize(
    "name, batch, overrides",
    [
        ("tiny", 5, ["model.depth=2", "predictor.depth=1"]),
        ("tiny", 4, ["model.depth=3", "predictor.depth=1", "loss.target_layers=[1,2]"]),
        ("tiny", 20, ["model.depth=1", "predictor.depth=3", "mask.num_target_blocks=3", "model.mlp_width=96"]),
        (
            "vith14",
            2,
            ["model.depth=1", "predictor.depth=1", "data.image_size=112", "model.heads=3", "mask.min_keep=4"],
        ),
    ],
)
def test_hardware_flops_are_those_of_the_counter(name, batch, overrides, context):
    config = load_config(ROOT / "configs" / f"{name}.yaml", [*SMALL, *overrides])
    masks = sampled_masks(build.build_ijepa(config), batch, 0, context)
    flops, counts = build.build_ijepa(config).flops, Counts.of(masks)
    assert flops.hardware(counts) == counted(build.build_model(config), masks, images_of(config, batch))
    # The difference: the scores, which the backward of attention computes again.
    assert flops.model(counts) == pytest.approx(flops.hardware(counts), rel=0.04)


def test_model_flops_are_within_one_percent_of_the_counter_at_a_published_width():
    config = load_config(ROOT / "configs" / "vitb16.yaml", ["model.depth=1", "predictor.depth=1"])
    masks = sampled_masks(build.build_ijepa(config), 2, 0, "all")
    found = build.build_ijepa(config).flops.model(Counts.of(masks))
    assert found == pytest.approx(counted(build.build_model(config), masks, images_of(config, 2)), rel=0.01)


def test_rows_that_the_last_block_drops_are_not_counted():
    """Target blocks that hold every patch leave the target encoder nothing to drop; the predictor drops its context."""
    config = load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, "model.depth=2", "predictor.depth=1"])
    flops, model = build.build_ijepa(config).flops, build.build_model(config)
    whole, part = (pack_masks([np.arange(4)], [[np.arange(n)] * 2], 64) for n in (64, 16))
    for masks in (whole, part):
        assert flops.hardware(Counts.of(masks)) == counted(model, masks, images_of(config, 1))
    after = 2 * 48**2 + 4 * 48 * 192
    targets = [flops.parts(Counts.of(masks))["target encoder"] for masks in (whole, part)]
    assert targets[0] - targets[1] == after * (64 - 16)


@pytest.mark.parametrize("policy", ["predictor", "every_2", "full"])
def test_recomputed_blocks_count_once_more(policy):
    """As far as they run again: not to the MLP's second layer, whose output the backward has no use for."""
    sizes = ["model.depth=3", "predictor.depth=2", f"engine.activation_checkpointing={policy}"]
    config = load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, *sizes])
    flops, masks = build.build_ijepa(config).flops, sampled_masks(build.build_ijepa(config), 3, 0, "all")
    assert flops.hardware(Counts.of(masks)) == counted(build.build_model(config), masks, images_of(config, 3))
    none = load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, *sizes[:2]])
    assert flops.model(Counts.of(masks)) == build.build_ijepa(none).flops.model(Counts.of(masks))


def test_compiled_blocks_are_recomputed_to_their_end(monkeypatch):
    """What follows attention is one graph, all of which runs again."""
    config = load_config(
        ROOT / "configs" / "tiny.yaml",
        [*SMALL, "model.depth=2", "predictor.depth=2", "engine.activation_checkpointing=full", "engine.compile=true"],
    )
    model, masks = build.build_model(config), sampled_masks(build.build_ijepa(config), 3, 0, "all")
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.compiled = block.recomputed = False  # the counter does not see into compiled code
    forward = Block.forward

    def again(self, *arguments, **options):
        if not torch.is_grad_enabled():  # the target encoder's
            return forward(self, *arguments, **options)
        return checkpoint(forward, self, *arguments, use_reentrant=True)  # repeats a block to its end

    monkeypatch.setattr(Block, "forward", again)
    found = build.build_ijepa(config).flops.hardware(Counts.of(masks))
    assert found == counted(model, masks, images_of(config, 3))


def test_counts_are_sums_over_the_images():
    masks = pack_masks([[0, 1, 2], [5]], [[[3, 4], [4, 5]], [[0, 1], [2, 3]]], 9)
    assert Counts.of(masks) == Counts(
        images=2, targets=7, context=4, context_pairs=10, blocks=8, prediction=16, prediction_pairs=68
    )


def test_counting_takes_no_time_to_speak_of():
    config = load_config(ROOT / "configs" / "vith14.yaml")
    flops, masks = build.build_ijepa(config).flops, sampled_masks(build.build_ijepa(config), 64, 0, "all")
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        flops.hardware(Counts.of(masks))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 50e-6


@pytest.mark.parametrize(
    "name, precision, teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("A100-PCIE-40GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H20", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp32", None),
    ],
)
def test_peaks_by_name(name, precision, teraflops):
    assert peak_flops(name, precision) == (None if teraflops is None else pytest.approx(1e12 * teraflops))


def test_the_table_is_of_dense_rates():
    for bf16, tf32, fp32 in PEAKS.values():
        assert bf16 == pytest.approx(2 * tf32, rel=0.05) and tf32 >= fp32


def test_a_share_is_only_given_where_the_peak_is_known():
    assert device_peak(torch.device("cpu"), "bf16") is None
    assert rates(model=6e12, hardware=9e12, seconds=2.0, devices=3, peak=None) == {
        "model_flops": 6e12,
        "hardware_flops": 9e12,
        "flops_per_second_per_device": 1e12,
    }
    known = rates(model=6e12, hardware=9e12, seconds=2.0, devices=3, peak=4e12)
    assert (known["mfu"], known["hfu"]) == (0.25, 0.375)
