"""Training on two machines with a link between them; and what each says when the other, or the link, is gone."""

import re
import time

import pytest

from tests.end_to_end.runs import assert_close_run, checkpoints_of, steps_of, wait_for_step
from tests.nodes import deepspeed, ended, torchrun, two_nodes
from tests.processes import PRETRAIN, assert_all, pretrain, run_ranks, undrawn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as pair:
        yield pair


@pytest.fixture
def start(nodes, small_config, tmp_path):
    """start(node's number, per_node, *overrides): the node's part of a run in tmp_path/run, and its log."""

    def begin(number, per_node, *overrides, launcher=torchrun):
        log = tmp_path / f"node-{number}.txt"
        words = ["--config", small_config, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
        return nodes[number].start(log, *launcher(nodes, number, per_node), PRETRAIN, *words, *overrides), log

    yield begin
    for node in nodes:
        node.kill_all()


@pytest.mark.parametrize("launcher, per_node", [(torchrun, 1), (torchrun, 2), (deepspeed, 1)])
def test_two_nodes_train_as_one(start, small_config, tmp_path, launcher, per_node):
    started = [start(number, per_node, launcher=launcher) for number in (0, 1)]
    ends = [ended(*one, 200) for one in started]
    assert_all(ends)
    words = ["--config", str(small_config), f"run_dir={tmp_path / 'one'}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert_all(run_ranks(undrawn, 2 * per_node, tmp_path / "output", pretrain, *words))
    assert_close_run(tmp_path / "run", tmp_path / "one")


def test_a_node_that_starts_late_is_waited_for(start):
    first = start(0, 1)
    time.sleep(20)
    assert_all([ended(*one, 200) for one in (first, start(1, 1))])


LONG = ("optimization.max_steps=100000", "checkpoint.every_steps=4", "engine.hang_seconds=8")


def under_way(start, run_dir):
    started = [start(number, 1, *LONG) for number in (0, 1)]
    wait_for_step(run_dir, 6, lambda: all(process.poll() is None for process, _ in started))
    return started


def assert_goes_on(start, run_dir):
    """The same command, for a few steps more: from the last checkpoint, whose steps are not taken again."""
    reached = max(checkpoints_of(run_dir))
    stop = f"optimization.stop_at_step={reached + 4}"
    ends = [ended(*one, 200) for one in [start(number, 1, *LONG, stop) for number in (0, 1)]]
    assert_all(ends)
    assert f"resumed from {run_dir}/checkpoints/step-{reached:08d}, step {reached}" in ends[0].output
    assert [step["step"] for step in steps_of(run_dir)] == list(range(reached + 4))


def test_a_link_that_is_cut_ends_both_within_a_time_and_the_same_command_goes_on(start, nodes, tmp_path):
    started = under_way(start, tmp_path / "run")
    nodes[1].cut()
    at = time.monotonic()
    for number, one in enumerate(started):
        end = ended(*one, 90)
        print(f"node {number} ended after {time.monotonic() - at:.0f} s")
        held_up = "rank 1" if number == 0 else "the first rank"
        assert end.code != 0 and f"error: rank {number} ({nodes[number].name}, pid " in end.output
        words = rf"hang_seconds=8 seconds: {held_up}( \(\S+, pid \d+\))? gives no sign any more"
        assert re.search(words, end.output), end.output
    nodes[1].mend()
    assert_goes_on(start, tmp_path / "run")


def test_a_node_that_is_killed_ends_the_other_within_a_time_and_the_same_command_goes_on(start, nodes, tmp_path):
    started = under_way(start, tmp_path / "run")
    nodes[1].kill_all()
    at = time.monotonic()
    end = ended(*started[0], 90)
    print(f"node 0 ended after {time.monotonic() - at:.0f} s")
    assert end.code != 0 and "error: another rank has ended, by its own error or a signal" in end.output
    assert_goes_on(start, tmp_path / "run")
