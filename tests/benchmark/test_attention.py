"""Attention is timed at the heads of the models, on the lengths that masks have; whole images on theirs."""

import torch

from ijepa_scale import build
from ijepa_scale.benchmark.attention import head_shapes, kernels_here, self_tests, time_attention, whole_images
from ijepa_scale.config import load_config

CPU = torch.device("cpu")
SMALL = ["model.width=48", "predictor.width=48", "optimization.micro_batch_size=2"]


def test_heads_are_the_models_and_what_the_predictor_could_have():
    assert head_shapes(load_config("vith14")) == [(16, 80), (16, 24), (12, 32), (6, 64)]
    assert head_shapes(load_config("tiny", SMALL)) == [(3, 16), (2, 24)]


def test_what_runs_on_a_cpu_is_tested_and_timed():
    config = load_config("tiny", SMALL)
    assert list(kernels_here(CPU)) == ["sdpa"]
    assert self_tests(config, CPU) == {"sdpa, head width 16": "right", "sdpa, head width 24": "right"}
    rows = time_attention(config, CPU, say=lambda text: None)["rows"]
    cases = [(row["kernel"], row["network"], row["heads"], row["head_width"]) for row in rows]
    assert cases == [("sdpa", "context", 3, 16), ("sdpa", "predictor", 2, 24), ("sdpa", "target", 3, 16)]
    for row in rows:
        assert ("forward and backward" in row) == (row["network"] != "target"), "which no gradient goes through"
        assert min(row["forward"].values()) > 0


def test_a_wrong_kernel_is_named(monkeypatch):
    def wrong(qkv, sequences):
        return 1.1 * qkv[:, 2]

    monkeypatch.setattr("ijepa_scale.benchmark.attention.kernels_here", lambda device: {"sdpa": wrong, "fa2": wrong})
    said = self_tests(load_config("tiny", SMALL), CPU)
    assert list(said) == ["fa2, head width 16", "fa2, head width 24"]
    assert all("gives a wrong" in one for one in said.values())


def test_whole_images_are_sequences_of_one_length():
    masks = build.build_ijepa(load_config("tiny", SMALL)).draw_masks(0, range(3))
    sequences, pairs = whole_images(masks, CPU)
    assert sequences.cu_seqlens.tolist() == [0, 64, 128, 192] and sequences.equal_lengths and pairs == 3 * 64**2
