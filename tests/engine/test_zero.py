"""DeepSpeed's config, and a model built for ZeRO-3."""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from ijepa_scale.engine import distributed, zero
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.positions import sincos_pos_embed
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer
from tests.engine import tiny
from tests.processes import assert_all, run_ranks

SIZES = {"zero_stage": 2, "precision": "bf16", "micro_batch_size": 4, "accumulation_steps": 3}


def position_embeddings_under_zero_init() -> None:
    distributed.start()
    expected = sincos_pos_embed(192, PatchGrid(16, 16))
    for precision in ("fp32", "bf16"):
        config = zero.deepspeed_config(**{**SIZES, "zero_stage": 3, "precision": precision})
        with zero.building_context(config):
            encoder = VisionTransformer(VIT_SIZES["vit_tiny"], image_size=128, patch_size=8)
        assert encoder.pos_embed.dtype == torch.float32
        assert torch.equal(encoder.pos_embed[0], expected), "zero.Init rounds what torch's constructors make"


def test_position_embeddings_are_exact_where_zero3_builds_the_model(tmp_path):
    assert_all(run_ranks(position_embeddings_under_zero_init, 1, tmp_path))


def test_gradients_are_accumulated_in_fp32_and_sent_as_asked():
    config = zero.deepspeed_config(**SIZES, clip_grad_norm=0.5)
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert zero.deepspeed_config(**SIZES, gradient_dtype="bf16")["communication_data_type"] == "bf16"
    assert config["bf16"] == {"enabled": True} and config["gradient_clipping"] == 0.5
    assert config["train_micro_batch_size_per_gpu"] == 4 and config["gradient_accumulation_steps"] == 3
    assert "bf16" not in zero.deepspeed_config(**{**SIZES, "precision": "fp32"})


def test_raw_settings_are_merged_last():
    with pytest.warns(UserWarning, match="zero_optimization: overlap_comm has no effect at engine.zero_stage=2"):
        config = zero.deepspeed_config(
            **SIZES, extra={"zero_optimization": {"overlap_comm": True}, "steps_per_print": 7}
        )
    assert config["zero_optimization"].items() >= {"stage": 2, "overlap_comm": True}.items()
    assert config["steps_per_print"] == 7


def steps_without_synchronization(zero_stage: int) -> None:
    from deepspeed.accelerator import get_accelerator

    ranks = distributed.start()
    for precision in ("fp32", "bf16"):
        engine, _ = tiny.start_engine(ranks, zero_stage=zero_stage, precision=precision)
        with mock.patch.object(type(get_accelerator()), "synchronize") as synchronize:
            for step in range(4):  # DeepSpeed's throughput timer starts with the third
                engine.backward(engine(*tiny.whole_batch(step))["loss"])
                engine.step()
        assert not synchronize.called
    ranks.close()


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_deepspeed_synchronizes_no_device(zero_stage, tmp_path):
    """As it does by default to time steps. On a GPU with overlap_comm it does so at the end of backward, too."""
    assert_all(run_ranks(steps_without_synchronization, 1, tmp_path, zero_stage))


class MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "a", "b", "uordblks", "fordblks", "c"]
    ]


def many_token_counts() -> None:
    ranks = distributed.start()
    tiny.start_engine(ranks, zero_stage=1, precision="fp32")
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    taken = []
    for first in (1000, 1200, 1400):
        for tokens in range(first, first + 200):
            torch.nn.functional.gelu(torch.randn(tokens, 8))
        taken.append(mallinfo().uordblks)
    assert taken[2] - taken[0] < 1e6, f"400 token counts took {(taken[2] - taken[0]) / 1e6:.1f} MB for good"
    ranks.close()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2 (glibc 2.33) to ask")
def test_token_counts_leave_nothing_in_memory(tmp_path):
    assert_all(run_ranks(many_token_counts, 1, tmp_path))


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    """Of names and bytes."""
    whole = hashlib.sha256()
    for name, values in sorted(weights.items()):
        whole.update(name.encode() + values.detach().numpy().tobytes())
    return whole.hexdigest()


def digests(result: str) -> None:
    ranks, found = distributed.start(), {}
    for stage in (1, 2, 3):
        engine, ema = tiny.start_engine(ranks, zero_stage=stage, precision="fp32")
        found[f"weights at {stage}"] = digest_of(tiny.weights_of(engine, ""))
        engine, ema = tiny.start_engine(ranks, zero_stage=stage, precision="bf16", offload=stage == 3)
        for kind, flats in (("masters", zero.masters(engine.optimizer)), ("ema", ema.shards)):
            found[f"{kind} at {stage}"] = digest_of(tiny.gathered(engine, ranks, flats))
    Path(result).write_text(json.dumps(found))
    ranks.close()


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_initial_weights_have_one_digest_at_every_stage_and_number_of_ranks(ranks, tmp_path):
    """That of a plain model, without DeepSpeed."""
    path = tmp_path / "digests.json"
    assert_all(run_ranks(digests, ranks, tmp_path, str(path)))
    plain = {
        name: tiny.first_weight(name, parameter.shape) for name, parameter in tiny.build_model().named_parameters()
    }
    trained = {name: values for name, values in plain.items() if not name.startswith("target_encoder.")}
    averaged = {name: values for name, values in plain.items() if name.startswith("context_encoder.")}
    expected = {"weights": digest_of(plain), "masters": digest_of(trained), "ema": digest_of(averaged)}
    for what, digest in json.loads(path.read_text()).items():
        assert digest == expected[what.split()[0]], what
