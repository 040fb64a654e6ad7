"""ZeRO-1 and -2's optimizer: what it sends, what it keeps, which gradients it takes (numbers: test_zero_parity.py)."""

import json
from typing import Any

import pytest
import torch

from ijepa_scale.engine import distributed, zero
from tests.engine import tiny, worker_traffic
from tests.processes import assert_all, run_ranks

# (ZeRO stage, precision, gradient dtype, accumulation steps)
CASES = [(1, "fp32", "fp32", 1), (1, "bf16", "fp32", 2), (1, "bf16", "bf16", 1), (2, "bf16", "bf16", 2)]
STAGE_3 = [(3, "bf16", "fp32", 1), (3, "bf16", "bf16", 1)]


def least_bytes(ranks: int, case: tuple[int, str, str, int], trained: int, averaged: int) -> dict[str, float]:
    """What a rank must send of a step: its part of others' gradients, of its own weights and averages."""
    zero_stage, precision, gradient_dtype, accumulation = case
    weight, gradient = {"fp32": 4, "bf16": 2}[precision], {"fp32": 4, "bf16": 2}[gradient_dtype]
    others = (ranks - 1) / ranks
    return {
        "reduce_scatter_base": others * gradient * trained * (accumulation if zero_stage > 1 else 1),
        "allgather_base": others * weight * (trained + averaged),
    }


@pytest.mark.parametrize(
    "ranks, cases",
    [(2, CASES), pytest.param(4, CASES, marks=pytest.mark.slow), pytest.param(2, STAGE_3, marks=pytest.mark.slow)],
)
def test_a_step_sends_the_least_that_the_method_needs(ranks, cases, tmp_path):
    """DeepSpeed's own ZeRO-1 and -2 all-reduce: twice as much of gradients, and twice that again in fp32."""
    path = tmp_path / "sent.json"
    assert_all(run_ranks(worker_traffic.run, ranks, tmp_path, str(path), cases, timeout=400))
    found = json.loads(path.read_text())
    for case in cases:
        facts = found[" ".join(map(str, case))]
        least = least_bytes(ranks, case, facts["trained"], facts["averaged"])
        for operation, least_of_it in least.items():
            # Parts are padded, to 128 elements of each rank: these networks have 27,000 parameters.
            assert least_of_it * 0.9999 < facts["sent"].pop(operation) < least_of_it * 1.03
        assert sum(facts["sent"].values()) < 0.005 * sum(least.values())  # the norm, and flags of ZeRO-3


def one_rank() -> None:
    ranks = distributed.start()
    for precision in ("fp32", "bf16"):
        engine, ema = tiny.start_engine(ranks, zero_stage=1, precision=precision)
        with worker_traffic.Traffic(1) as traffic:
            engine.backward(engine(*tiny.whole_batch(0))["loss"])
            engine.step()
            ema.update()
        assert not traffic.sent, "one rank has nobody to send to"
        for bucket in engine.optimizer.buckets:
            same = bucket.master.data_ptr() == bucket.weights.data_ptr()
            assert same == (precision == "fp32"), "fp32 weights are their own masters"
            assert bucket.gradients is bucket.gradient is None, "gradients are kept between steps"
    ranks.close()


def test_one_rank_sends_and_copies_nothing(tmp_path):
    assert_all(run_ranks(one_rank, 1, tmp_path))


class TwoOfThree(torch.nn.Module):
    """A parameter that only one rank's loss knows, and one that none knows."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.rare, self.never = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))


def first(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.ones(shape)


def without_gradients() -> None:
    ranks = distributed.start()
    for zero_stage in (1, 2):
        config = zero.deepspeed_config(
            zero_stage=zero_stage, precision="fp32", micro_batch_size=1, accumulation_steps=1
        )
        model = TwoOfThree()

        def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
            groups = [{"params": list(module.parameters()), "ema": False}]
            return torch.optim.AdamW(groups, lr=0.5, weight_decay=0.0, fused=True)

        engine = zero.initialize(model, config, first, adamw, whole=torch.nn.Linear)
        for _ in range(2):
            engine.backward((model.used * 2 + (model.rare * 4 if ranks.rank else 0)).sum())
            engine.step()
        # AdamW's steps are of the learning rate where the gradient stays the same, and of 0 where it is 0
        assert torch.allclose(model.used, torch.zeros(3), atol=1e-4)
        assert torch.allclose(model.rare, torch.zeros(3), atol=1e-4)
        assert torch.equal(model.never, torch.ones(3))
        # gradients are means over ranks: 2, 4 / 2 and 0, of three elements each
        assert float(engine.get_global_grad_norm()) == pytest.approx((3 * (2**2 + 2**2)) ** 0.5)
    ranks.close()


def test_parameters_that_a_backward_does_not_reach_have_no_gradient(tmp_path):
    """On all ranks or on some, whose collectives must not wait for it for ever."""
    assert_all(run_ranks(without_gradients, 2, tmp_path))


def in_flight() -> None:
    """With buckets of one parameter."""
    ranks = distributed.start()
    config = zero.deepspeed_config(
        zero_stage=2, precision="bf16", micro_batch_size=4, accumulation_steps=1,
        extra={"zero_optimization": {"reduce_bucket_size": 1}},
    )  # fmt: skip
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(8)))

    def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": list(module.parameters()), "ema": False}], lr=0.1, fused=True)

    engine = zero.initialize(model, config, lambda name, shape: torch.ones(shape) / 32, adamw, whole=torch.nn.Tanh)
    optimizer = engine.optimizer
    order, held = [], []
    for at, bucket in enumerate(optimizer.buckets):

        def note(parameter, at=at):
            order.append(at)
            held.append(sum(one.gradients is not None for one in optimizer.buckets))

        bucket.parameters[0].register_post_accumulate_grad_hook(note)
    engine.backward(engine(torch.ones(4, 32, dtype=torch.bfloat16)).square().mean())
    assert order == list(range(8))[::-1]
    assert max(held) <= 3, "gradients of whole buckets are kept beyond the two on their way and the one at work"
    assert all(bucket.gradient.numel() == 32 * 32 // 2 for bucket in optimizer.buckets)
    engine.step()
    ranks.close()


def test_gradients_leave_while_the_backward_goes_on(tmp_path):
    assert_all(run_ranks(in_flight, 2, tmp_path))


def on_their_way() -> None:
    ranks = distributed.start()
    engine, ema = tiny.start_engine(ranks, zero_stage=1, precision="fp32", accumulation=2)  # with small buckets
    module, optimizer, seen = engine.module, engine.optimizer, []
    batches = tiny.micro_batches(0, ranks, 2)

    def note(name: str) -> Any:
        def forward(module: Any, arguments: Any) -> None:
            weights = all(b.arriving is None for b in optimizer.buckets if set(b.parameters) & set(module.parameters()))
            seen.append((name, weights, sum(b.arriving is not None for b in optimizer.buckets), len(ema._on_their_way)))

        return forward

    for name in (
        "context_encoder.blocks.0",
        "context_encoder.blocks.1",
        "target_encoder",
        "predictor.predictor_blocks.0",
    ):
        module.get_submodule(name).register_forward_pre_hook(note(name.partition(".")[0]))
    for batch in batches:
        engine.backward(engine(*batch)["loss"])
        engine.step()
    ema.update()
    seen.clear()
    engine(*batches[0])
    names, complete, weights_coming, averages_coming = zip(*seen, strict=True)
    assert names == ("context_encoder", "context_encoder", "target_encoder", "predictor")
    assert all(complete), "a module runs before its weights are there"
    assert weights_coming[0] > weights_coming[1] == weights_coming[2] > 0 == weights_coming[3]
    averaged = sum(bucket.ema is not None for bucket in optimizer.buckets)
    assert averages_coming == (averaged, averaged, 0, 0) and averaged
    ranks.close()


def test_weights_and_averages_come_in_behind_the_forward(tmp_path):
    assert_all(run_ranks(on_their_way, 2, tmp_path))
