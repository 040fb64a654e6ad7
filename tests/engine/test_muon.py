"""Muon: orthogonal updates beside the singular value decomposition, and training beside a plain loop, on real ranks."""

import json

import pytest
import torch

from ijepa_scale.engine import muon
from ijepa_scale.engine.checkpoint import KINDS
from tests.engine import tiny, worker_checkpoint, worker_zero_parity
from tests.processes import assert_all, run_ranks

ROUNDING = 2e-6  # measured: losses within 5e-7
NORM_ROUNDING = 3e-5  # measured: gradient norms within 5e-6 of themselves
WEIGHTS_ROUNDING = 3e-5  # measured: 1.1e-5: the rounding of small singular values grows
# (ZeRO stage, precision, accumulation steps, clip)
ONE_RANK = (1, ((1, "fp32", 1, 0.0), (3, "fp32", 1, 0.0)))
TWO_RANKS = (2, ((1, "fp32", 2, worker_zero_parity.CLIP), (3, "fp32", 1, 0.0)))
MORE = (2, ((2, "fp32", 2, worker_zero_parity.CLIP), (1, "bf16", 1, 0.0), (3, "bf16", 2, 0.0)))
FOUR_RANKS = (4, ((1, "fp32", 1, 0.0), (2, "bf16", 2, 0.0), (3, "fp32", 1, 0.0)))
LAUNCHES = [
    pytest.param(
        launch, marks=[pytest.mark.slow] if launch in (MORE, FOUR_RANKS) else [], id=f"{launch[0]} ranks {launch[1][0]}"
    )
    for launch in (ONE_RANK, TWO_RANKS, MORE, FOUR_RANKS)
]


@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16), (1, 7)])
def test_an_update_has_the_singular_vectors_of_its_matrix_and_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ muon.orthogonal(matrix) @ vt.T
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-10)
    assert inside.diagonal().min() > 0.3 and inside.diagonal().max() < 1.3  # the smallest of a square one lag behind
    assert 0.65 < inside.diagonal().median() < 1.2


def test_an_update_is_of_adamws_size_whatever_the_scale_of_the_gradient_and_the_shape_of_the_matrix():
    for shape in ((192, 192), (576, 192), (192, 768)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for scale in (1e-30, 1e-12, 1.0, 1e6):
            assert muon.update(matrix * scale).square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
    assert torch.equal(muon.update(torch.zeros(4, 8)), torch.zeros(4, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(192, 192), (576, 192), (384, 1536), (1280, 5120)])
def test_on_a_gpu_in_bf16_an_update_is_near_the_exact_one(shape):
    """By its effect on vectors, within a few roundings of bf16 in each of five iterations."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = muon.orthogonal(matrix) * muon.SIZE * max(shape) ** 0.5
    for scale in (1e-12, 1.0, 1e6):
        found = muon.update((matrix * scale).float().cuda())
        assert found.dtype == torch.float32 and found.is_cuda
        assert torch.linalg.norm(found.double().cpu() - exact) < 0.05 * torch.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(24, 24), (36, 12), (12, 48)])
def test_several_matrices_are_made_orthogonal_as_each_alone(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrices[1] *= 1e-20
    together = muon.orthogonal(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, muon.orthogonal(matrix), rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
def test_on_a_gpu_updates_that_are_computed_together_are_those_of_each_alone(monkeypatch):
    shapes = [torch.Size(shape) for shape in [(48, 16), (16, 64), (48, 16), (16, 64), (48, 16), (16, 16)]]
    whole = torch.randn(sum(shape.numel() for shape in shapes), generator=torch.Generator().manual_seed(4)).cuda()
    count = len(whole) // 3 + 1  # begins and ends within matrices
    found = {}
    for most in (1, 2 * 48 * 16, muon.AT_ONCE):
        monkeypatch.setattr(muon, "AT_ONCE", most)
        found[most] = torch.zeros(3 * count, device="cuda")
        for first in range(0, 3 * count, count):
            for place, values in muon.own_updates(whole, shapes, first, count):
                found[most][first + place : first + place + len(values)] += values
        torch.testing.assert_close(found[most], found[1], rtol=0.1, atol=0.02)  # bf16's rounding, of values near 1


def test_own_parts_of_updates_are_those_of_the_whole_matrices():
    """Parts that begin and end within a matrix, and between two."""
    shapes = [torch.Size(shape) for shape in ((4, 6), (3, 5), (8, 2))]
    flats = [torch.randn(shape.numel(), generator=torch.Generator().manual_seed(at)) for at, shape in enumerate(shapes)]
    expected = torch.cat([muon.update(flat.view(shape)).flatten() for flat, shape in zip(flats, shapes, strict=True)])
    whole = torch.cat([*flats, torch.zeros(5)])  # padded to equal parts
    for count in (1, 7, 20, 24, 60):
        found = torch.zeros_like(whole)
        for first in range(0, len(whole), count):
            for place, values in muon.own_updates(whole, shapes, first, count):
                found[first + place : first + place + len(values)] += values
        assert torch.equal(found[:-5], expected) and not found[-5:].any()


def test_matrices_of_blocks_are_apart():
    groups = {group["name"]: group for group in tiny.groups_of(tiny.build_model(), muon=True)}
    assert list(groups) == [f"{n}.{k}" for n in ("context_encoder", "predictor") for k in ("muon", "decay", "no_decay")]
    shapes = [tuple(p.shape) for p in groups["context_encoder.muon"]["params"]]
    assert shapes == [(96, 32), (32, 32), (64, 32), (32, 64)] * 2
    assert [tuple(p.shape) for p in groups["context_encoder.decay"]["params"]] == [(32, 3, 8, 8)]
    assert all(groups[f"{n}.muon"]["decay"] and groups[f"{n}.muon"]["muon"] for n in ("context_encoder", "predictor"))
    assert not any(group["muon"] for group in tiny.groups_of(tiny.build_model()))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_training_equals_a_plain_loop(launch, tmp_path):
    """In fp32; in bf16 the average is that of the masters bit for bit, and the forward uses both."""
    ranks, cases = launch
    path = tmp_path / "facts.json"
    assert_all(run_ranks(worker_zero_parity.run_muon, ranks, tmp_path, str(path), cases, timeout=400))
    for (_, precision, *_), facts in zip(cases, json.loads(path.read_text()), strict=True):
        assert facts["applied"] and facts["ema_exact"] and facts["target_is_ema"] and facts["weights_are_masters"]
        assert facts["bad_step_applied"] == [False] * ranks and facts["bad_step_left_all"] == [True] * ranks
        assert facts["ema_moved"] > 1e-2
        if precision == "fp32":
            assert facts["loss"] < ROUNDING and facts["grad_norm"] < NORM_ROUNDING
            assert facts["masters"] < WEIGHTS_ROUNDING and facts["ema"] < WEIGHTS_ROUNDING


def test_its_state_is_read_at_another_stage_to_the_bit(tmp_path):
    """Momentum lies where AdamW's first moment does, in parts of the same form."""
    engines = [(1, "bf16"), (3, "bf16")]
    names = [worker_checkpoint.name_of(stage, precision, 2) for stage, precision in engines]
    path = tmp_path / "facts.json"
    arguments = (str(tmp_path / "runs"), engines, names, str(path), True)
    assert_all(run_ranks(worker_checkpoint.reshard, 2, tmp_path, *arguments, timeout=400))
    facts = json.loads(path.read_text())
    assert len(facts) == 4
    for found in facts.values():
        assert found == {"bits": list(KINDS), "steps": True, "weights": True, "target": True}
