"""Compiled blocks and activation checkpointing under ZeRO-1, -2 and -3, on real ranks, beside the plain forward."""

import json

import numpy as np
import pytest

from tests.engine import worker_compile as worker
from tests.processes import assert_all, run_ranks

STAGES = (1, 2, 3)
VARIANTS = {
    "plain": {},
    "full": {"recompute_every": (1, 1)},
    "every_2": {"recompute_every": (2, 1)},
    "compiled": {"compiled": True},
    "compiled full": {"compiled": True, "recompute_every": (1, 1)},
}
ROUNDING = 1e-6  # relative; measured on one rank: 1.5e-7


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    assert_all(run_ranks(worker.run, 2, folder, str(folder / "facts.json"), STAGES, VARIANTS, timeout=400))
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["full", "every_2"])
def test_recomputation_changes_no_bit(facts, variant, stage):
    found, plain = facts[f"{variant} {stage}"], facts[f"plain {stage}"]
    assert found["losses"] == plain["losses"]
    assert found["norms"] == plain["norms"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["compiled", "compiled full"])
def test_compiled_blocks_train_alike(facts, variant, stage):
    found, plain = facts[f"{variant} {stage}"], facts[f"plain {stage}"]
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=ROUNDING)
    np.testing.assert_allclose(found["norms"], plain["norms"], rtol=ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["compiled", "compiled full"])
def test_no_batch_compiles_anything_again(facts, variant, stage):
    """Two halves of a block, each for the target encoder, the context encoder and the predictor; then 20 batches."""
    found = facts[f"{variant} {stage}"]
    assert found["warm_graphs"] == 6
    assert found["later_graphs"] == 0
    assert found["breaks"] == 0
    assert facts[f"plain {stage}"]["warm_graphs"] == 0
