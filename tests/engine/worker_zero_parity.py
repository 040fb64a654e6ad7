"""Runs inside ranks: the engine beside a plain PyTorch loop, at several ZeRO stages; what it measured goes to JSON."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.engine import distributed, zero
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.optim import set_schedules
from tests.engine import tiny

STEPS = 20
BAD_STEP = 7  # one rank's loss is NaN here
CLIP = 0.15  # below every gradient norm of these steps
TERMS = {"variance": 0.3, "covariance": 0.1}  # their statistics are of one micro-step: with accumulation they differ
UNSEEN = 1000  # the step whose images the target encoders are compared on


def schedule(step: int) -> tuple[float, float, float]:
    """(learning rate, weight decay, EMA momentum), all moving."""
    return 2e-3 * (1 - 0.5 * step / STEPS), 0.05 + 0.1 * step / STEPS, 0.9 + 0.05 * step / STEPS


class PlainMuon:
    """The definition, of whole matrices: A = X X^T, X <- aX + (bA + cA^2) X, five times (arXiv:2502.16982)."""

    def __init__(self, matrices: list[torch.nn.Parameter]):
        self.matrices = [(matrix, torch.zeros_like(matrix, dtype=torch.float64)) for matrix in matrices]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for matrix, momentum in self.matrices:
            gradient = matrix.grad.double()
            momentum.copy_(0.95 * momentum + 0.05 * gradient)
            x = 0.05 * gradient + 0.95 * momentum
            x = x / x.square().sum().sqrt()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            update = 0.2 * max(matrix.shape) ** 0.5 * x
            matrix.copy_(matrix - lr * weight_decay * matrix - lr * update)


class Plain:
    """One process, one forward for the global batch, whole tensors: nothing of engine/ or optim.py."""

    def __init__(self, clip: float, terms: dict[str, float], muon: bool = False):
        self.clip = clip
        self.model = tiny.build_model(**terms)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tiny.first_weight(name, parameter.shape))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.muon = PlainMuon([p for name, p in named if muon and "blocks." in name and p.ndim == 2])
        apart = {matrix for matrix, _ in self.muon.matrices}
        trained = [p for _, p in named if p not in apart]
        self.decayed = {"params": [p for p in trained if p.ndim > 1]}
        rest = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([self.decayed, rest], betas=tiny.BETAS, foreach=False)
        self.ema = {name: p.detach().clone() for name, p in self.model.context_encoder.named_parameters()}
        self.ema_bf16 = {name: values.bfloat16() for name, values in self.ema.items()}

    def step(self, step: int) -> tuple[float, float]:
        """Returns the loss and the gradient norm. A step that is not finite changes nothing."""
        lr, weight_decay, momentum = schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        loss = self.model(*tiny.whole_batch(step))["loss"]
        if step == BAD_STEP:
            return math.nan, math.inf
        self.model.zero_grad()
        loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.clip or math.inf)
        self.optimizer.step()
        self.muon.step(lr, weight_decay)
        with torch.no_grad():
            targets = dict(self.model.target_encoder.named_parameters())
            for name, parameter in self.model.context_encoder.named_parameters():
                self.ema[name].mul_(momentum).add_((1 - momentum) * parameter)
                self.ema_bf16[name].mul_(momentum).add_((1 - momentum) * parameter.bfloat16())
                targets[name].copy_(self.ema[name])
        return loss.item(), float(norm)

    def masters(self) -> tiny.Weights:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}


def snapshot(engine: Any, ema: Any, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All state of this rank, and the weights of the forward, in copies."""
    ema.wait()
    state: dict[str, torch.Tensor] = {}
    for i, flat in enumerate(zero.masters(engine.optimizer)):
        state[f"master {i}"] = flat.detach().clone()
        state.update({f"{key} {i}": value.clone() for key, value in engine.optimizer.optimizer.state[flat].items()})
    state.update({f"ema {i}": shard.clone() for i, shard in enumerate(ema.shards) if shard is not None})
    return state | tiny.weights_of(engine, "")


def target_error(engine: Any, ranks: Ranks, found: torch.Tensor, ema_weights: tiny.Weights) -> float:
    """Largest difference between unseen_forward() and the forward of a plain encoder with the EMA's weights.

    On the first rank, which tells; 0 on others.
    """
    if not ranks.first:
        return 0.0
    dtype = engine.module.target_encoder.dtype
    plain = tiny.build_encoder()
    for parameter in plain.parameters():  # not the buffers: DeepSpeed leaves these in fp32
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ema_weights[f"context_encoder.{name}"].view(parameter.shape))
        return float((found - plain(tiny.global_batch(UNSEEN)[0]).float()).abs().max())


def unseen_forward(engine: Any) -> torch.Tensor:
    with torch.no_grad():
        return engine.module.target_encoder(tiny.global_batch(UNSEEN)[0]).float()


def take_step(engine: Any, ema: Any, ranks: Ranks, step: int, accumulation: int) -> tuple[float, bool]:
    """(mean loss over all ranks, whether the step was applied), as train.py does it."""
    lr, weight_decay, momentum = schedule(step)
    set_schedules(engine.optimizer.optimizer.param_groups, lr=lr, weight_decay=weight_decay, ema_momentum=momentum)
    losses = []
    for micro, batch in enumerate(tiny.micro_batches(step, ranks, accumulation)):
        loss = engine(*batch)["loss"]
        if step == BAD_STEP and micro == 0 and ranks.rank == ranks.world_size - 1:
            loss = loss * math.nan
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    applied = engine.was_step_applied()
    if applied:
        ema.update()
    return ranks.sum([sum(losses) / accumulation])[0] / ranks.world_size, applied


def compare(
    ranks: Ranks, *, zero_stage: int, precision: str, accumulation: int, clip: float, muon: bool = False
) -> dict[str, Any]:
    """STEPS steps of the engine and, on the first rank, of the plain loop; how far apart they are there."""
    terms = TERMS if accumulation == 1 else {}
    engine, ema = tiny.start_engine(
        ranks, zero_stage=zero_stage, precision=precision, accumulation=accumulation, clip=clip, muon=muon, terms=terms
    )
    plain = Plain(clip, terms, muon)
    optimizer = engine.optimizer
    initial = tiny.gathered(engine, ranks, zero.masters(optimizer))
    expected = {name: tiny.first_weight(name, p.shape) for name, p in plain.masters().items()}
    unseen = unseen_forward(engine)
    ema_by_hand = {name: w.clone() for name, w in initial.items() if name.startswith("context_encoder.")}
    facts: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "initial_masters_exact": tiny.bits_equal(initial, expected),
        "buffers_exact": tiny.bits_equal(dict(engine.module.named_buffers()), dict(tiny.build_model().named_buffers())),
        "initial_target_error": target_error(engine, ranks, unseen, ema_by_hand),
    }
    loss_errors, norm_errors, target_errors, target_moves, ema_exact = [], [], [], [], []
    for step in range(STEPS):
        kept = snapshot(engine, ema, ranks) if step == BAD_STEP else {}
        loss, applied = take_step(engine, ema, ranks, step, accumulation)
        plain_loss, plain_norm = plain.step(step) if ranks.first else (loss, 1.0)
        if step == BAD_STEP:
            facts["bad_step_applied"] = ranks.gather(applied)
            facts["bad_step_left_all"] = ranks.gather(tiny.bits_equal(kept, snapshot(engine, ema, ranks)))
            facts["bad_loss_is_nan"] = math.isnan(loss)
            continue
        facts["applied"] = facts.get("applied", True) and all(ranks.gather(applied))
        loss_errors.append(abs(loss - plain_loss))
        norm_errors.append(abs(float(engine.get_global_grad_norm()) / plain_norm - 1))
        masters = tiny.gathered(engine, ranks, zero.masters(optimizer))
        for name, values in ema_by_hand.items():
            values.lerp_(masters[name], 1.0 - schedule(step)[2])
        ema_now = tiny.gathered(engine, ranks, ema.shards)
        ema_exact.append(tiny.bits_equal(ema_now, ema_by_hand))
        before, unseen = unseen, unseen_forward(engine)
        target_errors.append(target_error(engine, ranks, unseen, ema_now))
        target_moves.append(float((unseen - before).abs().max()))
    plain_ema = {f"context_encoder.{name}": values for name, values in plain.ema.items()}
    dtype = engine.module.target_encoder.dtype
    ema.wait()
    used = tiny.weights_of(engine, "context_encoder.") | tiny.weights_of(engine, "predictor.")
    targets = {
        name.replace("target_encoder.", "context_encoder."): values
        for name, values in tiny.weights_of(engine, "target_encoder.").items()
    }
    return facts | {
        "loss": max(loss_errors),
        "grad_norm": max(norm_errors),
        "masters": tiny.largest_difference(masters, plain.masters()),
        "ema": tiny.largest_difference(ema_now, plain_ema),
        "ema_exact": all(ema_exact),
        "ema_moved": tiny.largest_difference(
            plain_ema, {name: values for name, values in expected.items() if name in plain_ema}
        ),
        "target_forward": target_errors,
        "target_moved": min(target_moves),
        "weights_are_masters": tiny.bits_equal(used, {name: values.to(dtype) for name, values in masters.items()}),
        "target_is_ema": tiny.bits_equal(targets, {name: values.to(dtype) for name, values in ema_now.items()}),
        "target_beside_plain": float((unseen - plain.model.target_encoder(tiny.global_batch(UNSEEN)[0])).abs().max()),
        "ema_in_bf16": max(float((plain.ema[n] - plain.ema_bf16[n].float()).abs().max()) for n in plain.ema),
    }


def stale_target(ranks: Ranks) -> list[float]:
    """target_error after each step at ZeRO-3 when what engine/ema.py does about persistent parameters is undone."""
    saved: list[torch.nn.Parameter] = []
    engine, ema = tiny.start_engine(
        ranks,
        zero_stage=3,
        precision="fp32",
        before_ema=lambda engine: saved.extend(engine.optimizer.persistent_parameters),
    )
    for parameter in saved:
        parameter.ds_persist = True
    engine.optimizer.persistent_parameters[:] = saved
    errors = []
    for step in range(3):
        take_step(engine, ema, ranks, step, 1)
        errors.append(target_error(engine, ranks, unseen_forward(engine), tiny.gathered(engine, ranks, ema.shards)))
    return errors


def unclipped_effect() -> float:
    """How far clipping moves the plain loop's masters: what a forgotten clip would show."""
    with_clip, without = Plain(CLIP, {}), Plain(0.0, {})
    for step in range(STEPS):
        with_clip.step(step)
        without.step(step)
    return tiny.largest_difference(with_clip.masters(), without.masters())


def run_muon(result: str, cases: tuple[tuple[int, str, int, float], ...]) -> None:
    """cases: (ZeRO stage, precision, accumulation steps, clip)."""
    ranks = distributed.start()
    facts = [
        compare(ranks, zero_stage=stage, precision=precision, accumulation=accumulation, clip=clip, muon=True)
        for stage, precision, accumulation, clip in cases
    ]
    if ranks.first:
        Path(result).write_text(json.dumps(facts))
    ranks.close()


def run(result: str, stages: tuple[int, ...], cases: tuple[tuple[str, int, float], ...]) -> None:
    """cases: (precision, accumulation steps, clip). The facts go to the JSON file result, from rank 0."""
    ranks = distributed.start()
    facts: dict[str, Any] = {
        f"{stage} {precision} {accumulation} {clip}": compare(
            ranks, zero_stage=stage, precision=precision, accumulation=accumulation, clip=clip
        )
        for stage in stages
        for precision, accumulation, clip in cases
    }
    if 3 in stages:
        facts["stale"] = stale_target(ranks)
    if ranks.first:
        Path(result).write_text(json.dumps(facts))
    ranks.close()
