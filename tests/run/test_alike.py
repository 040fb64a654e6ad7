"""What ranks compare at the start; two machines that differ: tests/end_to_end/test_unlike_nodes.py."""

from dataclasses import replace

import pytest

from ijepa_scale.config import DataConfig, OptimizationConfig, PretrainConfig
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine import distributed
from ijepa_scale.run.alike import start_facts
from tests.engine import standin
from tests.processes import assert_all, run_ranks


def test_paths_of_a_machine_may_differ_and_nothing_else():
    config = PretrainConfig(run_dir="a", data=DataConfig(cache_dir="/a"))
    here = start_facts(config, **{"--resume": "auto"})
    elsewhere = replace(config, run_dir="b", data=DataConfig(cache_dir="/b"))
    assert start_facts(elsewhere, **{"--resume": "auto"}) == here
    other = start_facts(replace(config, optimization=OptimizationConfig(lr=0.5)), **{"--resume": "never"})
    assert {key for key in here if here[key] != other[key]} == {"optimization.lr", "--resume"}


def verify_own(folder):
    """Each rank looks at a checkpoint of its own."""
    ranks = distributed.start()
    with pytest.raises(ValueError, match=r"of rank 1 \(.*\) is not that of rank 0 \(.*\): step 1 there, 2 here"):
        checkpoints.verify(folder / f"of-{ranks.rank}", ranks)
    with pytest.raises(ValueError, match=r"of rank 1 \(.*\) is not that of rank 0 \(.*\): step none there, 2 here"):
        checkpoints.verify(folder / ("of-0" if ranks.first else "nowhere"), ranks)
    ranks.close()


def test_a_checkpoint_that_is_another_one_elsewhere_is_refused(tmp_path):
    for rank, step in ((0, 2), (1, 1)):
        standin.save(tmp_path / "checkpoints", step)
        (tmp_path / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"of-{rank}")
    assert_all(run_ranks(verify_own, 2, tmp_path, tmp_path))
