"""One process that benchmarks a small model while memory runs out."""

import json
import weakref
from pathlib import Path

import torch

from ijepa_scale import build
from ijepa_scale.benchmark import step as benchmark
from ijepa_scale.benchmark.alone import alone as step_alone
from ijepa_scale.config import load_config
from ijepa_scale.models.attention import Sequences, packed_attention
from ijepa_scale.models.attention_backends import Choice, Choices
from ijepa_scale.objectives.ijepa import IJepa
from ijepa_scale.plan.step_model import Rates


def short_of_memory(config: str, overrides: list[str], most: int, out: str) -> None:
    """The training step raises what CUDA raises for more than `most` images: on all context, which comes last."""
    config_ = load_config(config, overrides)
    models = weakref.WeakSet()
    at_once, said = [], []
    forward = IJepa.forward

    def limited(self, images, masks):
        models.add(self)
        at_once.append(len(models))
        ragged = masks.context.num_tokens != len(images) * masks.context.max_seqlen
        if len(images) > most and (ragged or not most):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore words")
        return forward(self, images, masks)

    IJepa.forward = limited
    try:
        found = benchmark.benchmark(config_, steps=1, say=said.append)
    except ValueError as error:
        found = {"error": str(error)}
    Path(out).write_text(json.dumps({**found, "said": said, "models_at_once": max(at_once)}))


def alone(overrides: list[str], steps: int, out: str) -> None:
    """The step alone, where memory holds no more than two images."""
    forward = IJepa.forward

    def limited(self, images, masks):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return forward(self, images, masks)

    IJepa.forward = limited
    config = load_config("tiny", [*overrides, "optimization.micro_batch_size=4"])
    rates = Rates(matrix=1e12, copy=1e10)
    for name, found in step_alone(config, Path(out, "trace"), rates=rates, say=print, steps=steps):
        Path(out, f"{name}.json").write_text(json.dumps(found))


def with_a_kernel(config: str, overrides: list[str], out: str) -> None:
    """build_attention() chooses a kernel, as it does on a GPU; how often it is called."""
    calls = []

    def attend(qkv: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        calls.append(qkv.shape)
        return packed_attention(qkv, Sequences(sequences.cu_seqlens, sequences.max_seqlen, sequences.num_tokens))

    choices = Choices(dict.fromkeys(("encoder", "predictor"), Choice("counting", attend, "a test")))
    build.build_attention = lambda config, **where: choices
    found = benchmark.benchmark(load_config(config, overrides), steps=1, say=lambda text: None)
    Path(out).write_text(json.dumps({**found, "calls": len(calls)}))
