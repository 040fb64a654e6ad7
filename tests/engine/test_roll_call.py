"""Processes that meet at the start, or do not, and what each hears of the others."""

import os
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from ijepa_scale.engine import distributed
from ijepa_scale.engine.launchers import Place
from ijepa_scale.engine.roll_call import (
    AGENT_STORE,
    NCCL_ENDED,
    StartError,
    call_off,
    group_store,
    host_store,
    roll_call,
)
from tests.processes import assert_all, free_port, run_ranks


def test_processes_without_local_ranks_meet_and_number_themselves():
    port = free_port()
    found = {}

    def start(rank):
        here = Place(rank, 3, -1, "127.0.0.1", port)
        store = host_store(here)
        found[rank] = roll_call(here, store, wait=timedelta(seconds=20))
        done.wait(20)  # rank 0's store lives as long as it is asked

    done = threading.Barrier(3)
    threads = [threading.Thread(target=start, args=(rank,)) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 0, 1: 1, 2: 2}  # all on this machine


def test_processes_alone_each_listen_on_a_port_of_their_own():
    """Chosen as it is bound: of two that look for a free one at once both may find the same."""
    stores = [host_store(Place()) for _ in range(50)]
    assert len({store.port for store in stores}) == 50 and min(store.port for store in stores) > 0


@pytest.mark.parametrize("rank, missing", [(0, "2 more processes (rank 1, 2)"), (1, "rank 0")])
def test_who_is_waited_for_is_said_and_not_for_ever(capfd, rank, missing):
    here = Place(rank, 3, 0, "127.0.0.1", free_port())
    store = host_store(here)
    with pytest.raises(StartError) as caught:
        roll_call(here, store, speak=0.2, wait=timedelta(seconds=3))
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"waiting for {missing} at 127.0.0.1:{here.port}, for up to 0.05 minutes: ")
    assert str(caught.value).startswith(f"waited 0.05 minutes for {missing} at 127.0.0.1:{here.port}: ")
    assert caught.value.local and ("unset RANK and WORLD_SIZE" in said.err) == (rank == 0)


def meet(size, alike, off=()):
    """What each of `size` processes, threads here, hears of the roll call; those of `off` call it off."""
    port, heard = free_port(), {}
    done = threading.Barrier(size)

    def start(rank):
        here = Place(rank, size, rank, "127.0.0.1", port)
        store = host_store(here)
        try:
            heard[rank] = roll_call(here, store, alike=alike[rank], wait=timedelta(seconds=20))
        except StartError as error:
            heard[rank] = error
        done.wait(30)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(size) if rank not in off]
    for thread in threads:
        thread.start()
    return port, heard, done, threads


def test_all_hear_who_runs_something_else_and_both_values():
    facts = [{"torch": "2.15", "seed": "0"}, {"torch": "2.15", "seed": "1"}, {"torch": "2.15"}]
    _, heard, _, threads = meet(3, facts)
    for thread in threads:
        thread.join()
    me = f"({socket.gethostname()}, pid {os.getpid()})"
    words = [str(heard[rank]) for rank in range(3)]
    assert len(set(words)) == 1 and f"rank 1 {me} has seed=1, rank 0 {me} has 0" in words[0]
    assert "torch" not in words[0] and "rank 2" not in words[0]  # alike; of this machine one has been told
    assert [heard[rank].local for rank in range(3)] == [True, False, False]  # one speaks


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_cannot_start_tells_those_that_wait(monkeypatch, which):
    port, heard, done, threads = meet(2, [{}, {}], off=[which])
    environ = {"RANK": which, "WORLD_SIZE": 2, "LOCAL_RANK": which, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in environ.items():
        monkeypatch.setenv(key, str(value))
    since = time.monotonic()
    call_off("there is no config file a.yaml")
    done.wait(20)
    threads[0].join()
    assert time.monotonic() - since < 10  # not all of its time
    words = f"rank {which} ({socket.gethostname()}, pid {os.getpid()}) does not start: there is no config file a.yaml"
    assert str(heard[1 - which]) == words


def test_nobody_is_waited_for_who_does_not_come(monkeypatch):
    """A process alone, with what a launcher set, ends although there is nobody to be told."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    since = time.monotonic()
    call_off("no", seconds=0.5)
    assert time.monotonic() - since < 5


def come_back() -> None:
    """One machine's torchrun has restarted its process once, that of the other has just been started."""
    os.environ.update({AGENT_STORE: "False", "TORCHELASTIC_RESTART_COUNT": str(1 - int(os.environ["RANK"]))})
    distributed.start().close()


def test_a_machine_that_comes_back_finds_the_others(tmp_path):
    assert_all(run_ranks(come_back, 2, tmp_path, timeout=60))


def test_an_attempt_of_torchrun_s_finds_nothing_of_the_one_before(monkeypatch):
    """In the agent's store, which outlives the ranks."""
    here, wait = Place(0, 2, 0, "127.0.0.1", free_port()), timedelta(seconds=20)
    agent = host_store(here)
    monkeypatch.setenv(AGENT_STORE, "True")
    group_store(here, host_store(here), wait).set("rank 1", "a port that nobody listens on any more")
    assert group_store(here, host_store(here), wait).check(["rank 1"])
    agent.set(NCCL_ENDED, "1")  # as the watchdog of a rank of the first attempt does, whatever the prefix
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    group_store(replace(here, rank=1), host_store(here), wait)  # which may come after rank 0 has begun to train
    assert agent.check([NCCL_ENDED])
    assert not group_store(here, host_store(here), wait).check(["rank 1"])
    assert not agent.check([NCCL_ENDED])
    del agent
