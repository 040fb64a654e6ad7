"""Compiled blocks and activation checkpointing under ZeRO-1, -2 and -3, on real ranks, beside the plain forward."""

import json

import numpy as np
import pytest

from tests.engine import worker_compile as worker
from tests.processes import assert_all, run_ranks

VARIANTS = {
    "plain": {},
    "full": {"recompute_every": (1, 1)},
    "every_2": {"recompute_every": (2, 1)},
    "compiled": {"compiled": True},
    "compiled full": {"compiled": True, "recompute_every": (1, 1)},
}
QUICK = [("plain", 1), ("full", 1), ("compiled full", 1)]
ALL = [(variant, stage) for variant in VARIANTS for stage in (1, 2, 3)]
ROUNDING = 1e-6  # relative; measured on one rank: 1.5e-7


def cases(*variants):
    """(variant, stage) of these, those that compile more than make test has time for marked slow."""
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL if case[0] in variants]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What the worker found of a variant at a stage; the quick ones are run apart from all."""
    runs = {}

    def found(variant, stage):
        wanted = QUICK if (variant, stage) in QUICK else ALL
        if len(wanted) not in runs:
            folder = tmp_path_factory.mktemp("compile")
            named = [(name, of, VARIANTS[name]) for name, of in wanted]
            assert_all(run_ranks(worker.run, 2, folder, str(folder / "facts.json"), named, timeout=400))
            runs[len(wanted)] = json.loads((folder / "facts.json").read_text())
        return runs[len(wanted)][f"{variant} {stage}"]

    return found


@pytest.mark.parametrize("variant, stage", cases("full", "every_2"))
def test_recomputation_changes_no_bit(facts, variant, stage):
    found = facts(variant, stage)
    assert found["losses"] == found["plain losses"]
    assert found["norms"] == found["plain norms"]
    assert not found["hooked"]  # DeepSpeed's own hooks keep no forward from writing over what it no longer needs


@pytest.mark.parametrize("variant, stage", cases("compiled", "compiled full"))
def test_compiled_blocks_train_alike_and_no_batch_compiles_anything_again(facts, variant, stage):
    """Two halves of a block, each for the target encoder, the context encoder and the predictor; then 20 batches."""
    found = facts(variant, stage)
    np.testing.assert_allclose(found["losses"], found["plain losses"], rtol=ROUNDING)
    np.testing.assert_allclose(found["norms"], found["plain norms"], rtol=ROUNDING)
    assert 6 <= found["warm_graphs"] <= 7  # one more where the target encoder is compiled behind a recomputed block
    assert found["later_graphs"] == 0
    assert found["breaks"] == 0
    assert facts("plain", stage)["warm_graphs"] == 0
