"""State and collectives of a plan against real ranks: their tensors, and what they hand to gloo."""

import json

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.plan import checks, memory
from ijepa_scale.plan.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, collectives
from tests.plan import worker_counted
from tests.processes import ROOT, assert_all, run_ranks

CONFIG = str(ROOT / "configs" / "tiny.yaml")
IMAGES = 8
SMALL = (
    "model.width=64", "model.depth=4", "model.heads=2", "predictor.width=32", "predictor.depth=2", "predictor.heads=2",
    "loss.variance=0", "loss.covariance=0", "engine.precision=bf16", f"optimization.global_batch_size={IMAGES}",
)  # fmt: skip
NAMES = {REDUCE_SCATTER: "reduce_scatter_base", ALL_GATHER: "allgather_base", ALL_REDUCE: "allreduce"}
ADAMW, BF16 = "optimization.optimizer=adamw", "engine.gradient_dtype=bf16"
OFFLOAD = "engine.offload_optimizer=cpu"
BUCKETS = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 30000}}"
# Every limit of ZeRO-3's is met at this size: what is kept, what is gathered ahead, how far apart two uses may be.
KEYS = ("stage3_max_reuse_distance", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
LIMITS = [
    f"engine.deepspeed={json.dumps({'zero_optimization': dict(zip(KEYS, limits, strict=True))})}"
    for limits in ((100_000, 100, 10_000), (200_000, 3000, 60_000), (400_000, 100, 100_000), (10**9, 100, 20_000))
]
# (ZeRO stage, micro-steps, overrides)
QUICK = [(1, 1, (ADAMW,)), (2, 2, (BF16, BUCKETS)), (3, 1, (ADAMW, LIMITS[0])), (2, 2, (BF16, BUCKETS, OFFLOAD))]
MORE = [
    (1, 2, (ADAMW, BUCKETS)), (1, 1, (BF16,)), (2, 1, (ADAMW,)), (2, 2, (ADAMW,)), (3, 2, ()), (3, 1, (BF16,)),
    (3, 2, (ADAMW, LIMITS[1], "engine.activation_checkpointing=full")), (3, 1, (ADAMW, LIMITS[2])),
    (3, 1, (ADAMW, LIMITS[3], "engine.activation_checkpointing=every_2")),
    (1, 1, (BF16, OFFLOAD)), (1, 2, (ADAMW, OFFLOAD)), (3, 2, (OFFLOAD,)),
]  # fmt: skip


@pytest.mark.parametrize(
    "ranks, cases",
    [
        (2, QUICK),
        pytest.param(1, [*QUICK, MORE[0], MORE[4], *MORE[-3:]], marks=pytest.mark.slow),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(4, [*QUICK, MORE[6]], marks=pytest.mark.slow),
    ],
)
def test_state_and_collectives_are_counted_exactly(ranks, cases, tmp_path):
    overrides = [
        [
            *SMALL,
            *more,
            f"engine.zero_stage={stage}",
            f"optimization.micro_batch_size={IMAGES // (ranks * micro_steps)}",
        ]
        for stage, micro_steps, more in cases
    ]
    path = tmp_path / "found.json"
    assert_all(run_ranks(worker_counted.run, ranks, tmp_path, str(path), CONFIG, overrides, timeout=900))
    for case, given, found in zip(cases, overrides, json.loads(path.read_text()), strict=True):
        config = load_config(CONFIG, given)
        objective = build.build_objective(config)
        _, _, settings = checks.settings(config, objective, ranks=ranks, device=torch.device("cpu"))
        model = memory.model_of(objective, config.optimization.optimizer)
        sharding = memory.sharding_of(settings, ranks=ranks)
        state = memory.state(model, sharding)
        assert found["state"] == {name: getattr(state, name) for name in found["state"]}, case
        if sharding.zero_stage < 3:
            assert found["everything"] == state.total + state.host, case
        else:  # and the bucket that gradients are sent from, and at this moment weights that are gathered still
            rest = found["everything"] - state.total - state.host - sharding.sent * sharding.bucket
            assert 0 <= rest <= 2 * (model.trained + model.averaged), case
        expected = collectives(model, sharding)
        if ranks == 1:  # whatever is called, nothing is sent
            assert not expected
            continue
        for operation, name in NAMES.items():
            sizes = [size for one in expected if one.operation == operation for size in one.sizes]
            counted = found["collectives"].pop(name, [])
            assert sum(counted) == sum(sizes), (case, operation)
            if sharding.zero_stage < 3:
                assert sorted(counted) == sorted(sizes), (case, operation)
        assert not found["collectives"], "ranks send something else"
