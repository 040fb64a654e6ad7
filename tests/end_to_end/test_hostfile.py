"""`deepspeed --hostfile` as it is: over pdsh and OpenSSH to two machines."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import assert_close_run, checkpoints_of, last_step, steps_of, wait_for_step
from tests.nodes import ended, ssh_between, two_nodes
from tests.processes import ENVIRONMENT, PRETRAIN, assert_all, pretrain, run_ranks, undrawn

pytestmark = pytest.mark.slow
LONG = ("optimization.max_steps=100000", "checkpoint.every_steps=4", "engine.hang_seconds=60")


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    return ssh_between(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def nodes(ssh):
    with two_nodes() as pair:
        yield pair


@pytest.fixture
def start(nodes, ssh, small_config, tmp_path):
    """start(*overrides): the launcher on the first node, of a run in tmp_path/run; with its log."""
    (tmp_path / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    environ = "".join(f"{key}={ENVIRONMENT[key]}\n" for key in ("DS_ACCELERATOR", "OMP_NUM_THREADS"))
    (tmp_path / ".deepspeed_env").write_text(environ)  # what the launcher does not hand on by itself

    def begin(*overrides):
        log = tmp_path / "launcher.txt"
        launcher = [Path(sys.executable).parent / "deepspeed", "--hostfile", tmp_path / "hostfile"]
        words = ["--config", small_config, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
        command = [*launcher, PRETRAIN, *words, *overrides]
        return nodes[0].start(log, *command, cwd=tmp_path, PATH=ssh.path), log

    yield begin
    for node in nodes:
        node.kill_all()


def test_a_hostfile_s_nodes_train_as_one(start, nodes, ssh, small_config, tmp_path):
    for node in nodes:
        ssh.serve(node)
    end = ended(*start(), 300)
    assert_all([end])
    words = ["--config", str(small_config), f"run_dir={tmp_path / 'one'}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert_all(run_ranks(undrawn, 2, tmp_path / "output", pretrain, *words))
    assert_close_run(tmp_path / "run", tmp_path / "one")


def test_a_hostfile_s_node_that_is_killed_ends_the_other_and_ctrl_c_stops_both(start, nodes, ssh, tmp_path):
    run_dir = tmp_path / "run"
    ssh.serve(nodes[0])
    server = ssh.serve(nodes[1])
    launcher, log = start(*LONG)
    wait_for_step(run_dir, 6, lambda: launcher.poll() is None, timeout=300)
    nodes[1].kill_all()
    server.wait()
    at = time.monotonic()
    end = ended(launcher, log, 90)
    print(f"the launcher ended after {time.monotonic() - at:.0f} s with {end.code}\n{end.output[-3000:]}")
    assert end.code != 0 and "error: another rank has ended, by its own error or a signal" in end.output

    ssh.serve(nodes[1])
    reached = max(checkpoints_of(run_dir))
    launcher, log = start(*LONG)
    until = time.monotonic() + 300
    while max(checkpoints_of(run_dir)) < reached + 4:  # of this start: the records are still those of the one before
        assert launcher.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    launcher.send_signal(signal.SIGINT)
    at = time.monotonic()
    end = ended(launcher, log, 90)
    print(f"the launcher ended after {time.monotonic() - at:.0f} s with {end.code}\n{end.output[-3000:]}")
    until = time.monotonic() + 60
    while max(checkpoints_of(run_dir)) != last_step(run_dir) + 1 and time.monotonic() < until:
        time.sleep(0.2)  # the launcher ends before its ranks do
    assert f"resumed from {run_dir}/checkpoints/step-{reached:08d}, step {reached}" in end.output
    assert max(checkpoints_of(run_dir)) == last_step(run_dir) + 1  # of the step at which they were asked
    assert [step["step"] for step in steps_of(run_dir)] == list(range(last_step(run_dir) + 1))
