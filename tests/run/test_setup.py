"""What is settled before a run's first step; runs themselves: tests/end_to_end."""

import re

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import DataConfig, ModelConfig, OptimizationConfig, PretrainConfig
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.models.attention_backends import Choice, Choices
from ijepa_scale.run import setup as run
from ijepa_scale.run.setup import check_shared_memory, choose_attention, set_up, slow_precision


class TwoRanks(Ranks):
    """The first of two ranks, the other of which chose or met something else."""

    def gather(self, value):
        return [value, self.other(value)]


def two_ranks(other):
    ranks = TwoRanks(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))
    object.__setattr__(ranks, "other", other)
    return ranks


def choose(ranks):
    return choose_attention(PretrainConfig(model=ModelConfig(name="vit_tiny")), ranks)


def test_ranks_attend_with_one_kernel(monkeypatch):
    assert choose(two_ranks(lambda value: value)).name == "sdpa"
    fa3 = Choices({"encoder": Choice("fa3", None, "it is there")})
    monkeypatch.setattr(build, "build_attention", lambda *config, **facts: fa3)
    with pytest.raises(
        ValueError, match="different kernels, fa2, fa3: install the same packages on every node, or set"
    ):
        choose(two_ranks(lambda value: "fa2" if isinstance(value, str) else value))


def test_a_kernel_that_is_wrong_on_another_rank_stops_all():
    wrong = ValueError("model.attention=fa3 on cuda:1 gives a wrong output")
    with pytest.raises(ValueError, match=re.escape(f"rank 1 (node1, pid 9): {wrong}")):
        choose(two_ranks(lambda value: ("rank 1 (node1, pid 9)", wrong) if isinstance(value, tuple) else value))


@pytest.mark.parametrize(
    "precision, device, capability, warned",
    [("bf16", "cpu", "AVX2", 1), ("bf16", "cpu", "AVX512", 0), ("fp32", "cpu", "AVX2", 0), ("bf16", "cuda", "AVX2", 0)],
)
def test_bf16_that_a_cpu_must_imitate_is_warned_of(monkeypatch, precision, device, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert len(slow_precision(precision, torch.device(device))) == warned


@pytest.mark.parametrize("theirs, fits", [("here:2", True), ("here:1", False)])
def test_ranks_that_share_memory_share_its_space(monkeypatch, theirs, fits):
    """Two ranks of four images of 3 kB: 9 micro-batches each, where two processes make four ahead."""
    monkeypatch.setattr(run, "shared_memory", lambda: ("here:1", 9 * 4 * 3 * 32 * 32))
    config = PretrainConfig(
        data=DataConfig(image_size=32, workers=2),
        model=ModelConfig(name="vit_tiny", patch_size=4),
        optimization=OptimizationConfig(global_batch_size=8),
    )
    if fits:
        check_shared_memory(config, None, two_ranks(lambda value: theirs))
        return
    with pytest.raises(ValueError, match=r"2 \+ 1\) x 2 ranks; .* data.workers=0"):
        check_shared_memory(config, None, two_ranks(lambda value: theirs))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    check_shared_memory(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun: both are on this machine
    with pytest.raises(ValueError, match="x 2 ranks"):
        check_shared_memory(config)


def test_a_card_too_small_for_the_state_is_told_to_all(monkeypatch):
    """Ranks may have other cards, of which one alone is too small."""
    monkeypatch.setattr(run.checks.os, "sysconf", lambda name: 1)
    told = []
    config = PretrainConfig(
        data=DataConfig(source="scenes"), model=ModelConfig(name="vit_tiny"), optimization=OptimizationConfig()
    )
    with pytest.raises(ValueError, match="optimizer's state take"):
        set_up(config, build.build_objective(config), two_ranks(told.append), resume="auto", allow_changes=False)
    assert "optimizer's state take" in str(told[0][1])
