"""How a process ends, with processes that do nothing else; runs: tests/end_to_end/test_ends.py and test_signals.py."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ijepa_scale.engine import signals
from ijepa_scale.engine.signals import Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]
# A rank: what it does is its argument. It is imported late, as torch would be, where it says so.
RANK = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
print(os.getpid(), flush=True)
time.sleep(float(os.environ.get("LATE", 0)))
from ijepa_scale.engine import signals
signals.GRACE_SECONDS, signals.POLL_SECONDS, signals.REPEAT_SECONDS = 0.5, 0.05, 0.3

def main(stop):
    print("ready", flush=True)
    exec(sys.argv[1], {{**globals(), 'stop': stop}})
    return 0

signals.run_process(main)
"""
# What Python does at its very end, when it has put signal handlers back: a launcher's SIGTERM comes then.
TERMINATED_LATE = """
class Late:
    kill, pid = staticmethod(os.kill), os.getpid()
    def __del__(self):
        self.kill(self.pid, 15)
sys.modules["late"] = Late()
"""
# Another process that starts a rank, and lives on.
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[-2:]]).wait()"
SLEEP = "time.sleep(30)"
# A call that comes back for no signal: a mutex that its owner locks again.
STUCK = (
    "import ctypes; c = ctypes.CDLL(None); m = ctypes.create_string_buffer(64); [c.pthread_mutex_lock(m) for _ in '12']"
)
DEAF_CHILD = """
import multiprocessing, signal
def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.closerange(1, 3)
    time.sleep(7)
multiprocessing.get_context("fork").Process(target=deaf, daemon=True).start()
time.sleep(0.2)
"""


@pytest.fixture
def rank(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(work, **environ):
        process = subprocess.Popen(
            [sys.executable, tmp_path / "rank.py", work],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "work, code, words",
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('a text')", 1, "a text\n"),
        (TERMINATED_LATE, 0, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        (f"{DEAF_CHILD}1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        (
            f"import threading; threading.Thread(target={SLEEP.replace('(30)', '')}, args=(9,)).start(); 1 / 0",
            1,
            "by zero",
        ),
        (
            "raise RuntimeError('[gloo/pair.cc:547] Connection closed by peer [::1]:80\\nmore')",
            1,
            "error: another rank has",
        ),
        (
            "raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Terminated. ')",
            75,
            "stopped by SIGTERM during set-up; the same command goes on",
        ),
        ("os.kill(os.getpid(), 1); time.sleep(9)", 75, "stopped by SIGHUP during set-up; the same command goes on"),
        ("os.kill(os.getpid(), 10); 1 / 0", 75, "stopped by SIGUSR1 during set-up; the same command goes on"),
        (f"os.kill(os.getpid(), 2)\ntry: time.sleep(9)\nfinally: {SLEEP}", 75, "stopped by SIGINT during set-up; "),
    ],
)
def test_a_process_ends_in_time_with_its_code_and_one_word(rank, work, code, words):
    process = rank(work)
    ended = process.wait(5)
    said = process.stderr.read()
    assert ended == code, said
    assert said.endswith(words) if words.endswith("\n") or not words else said.startswith(words) or words in said, said
    assert ("Traceback" in said) == ("1 / 0" in work and code == 1), said


def test_output_that_nobody_reads_is_said_in_one_line(rank):
    process = rank("time.sleep(0.3); print('more', flush=True)")
    words = "error: standard output was closed; the same command goes on from the last checkpoint\n"
    assert process.stdout.readline() and process.stdout.readline() == "ready\n"
    process.stdout.close()
    assert process.stderr.read() == words
    assert process.wait(20) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_a_call_that_does_not_come_back(rank, number):
    process = rank(STUCK)
    assert process.stdout.readline() and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    assert process.stderr.read() == f"stopped by {number.name} during set-up; the same command goes on from there\n"
    assert process.wait(20) == 75


def test_a_second_ctrl_c_in_training_ends_at_once(rank):
    process = rank(f"with stop.between_steps():\n {STUCK}")
    assert process.stdout.readline() and process.stdout.readline() == "ready\n"
    for pause in (0.1, 0.1, 0.5):  # two at once are one, and its launcher's echo
        time.sleep(pause)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.stderr.read().startswith("error: interrupted by a second Ctrl-C; the same command goes on from the ")
    assert process.wait(20) == 1


def test_while_it_trains_a_process_is_told_of_every_signal_and_goes_on(rank):
    work = """
for number in (1, 2, 10, 15):
    stop.reason = ""
    with stop.between_steps():
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        print(stop.pending())
"""
    said, errors = rank(work).communicate(timeout=20)
    assert said.split()[2:] == ["SIGHUP", "SIGINT", "SIGUSR1", "SIGTERM"] and not errors


def test_nohup_is_heeded(rank):
    process = rank("import signal; signal.raise_signal(signal.SIGHUP); print('goes on')")
    assert process.communicate(timeout=20)[1].startswith("stopped by SIGHUP")
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which processes hand on
    try:
        process = rank("import signal; signal.raise_signal(signal.SIGHUP); print('goes on')")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert "goes on" in process.communicate(timeout=20)[0] and process.returncode == 0


@pytest.mark.parametrize(
    "launcher, environ, died",
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "1"}, True),
        ("deepspeed", {}, True),
        ("a_script", {"RANK": "0", "WORLD_SIZE": "2"}, False),  # srun, PyTorchJob, an operator of one's own
    ],
)
@pytest.mark.parametrize("work", [SLEEP, STUCK])
def test_a_launcher_that_dies_in_set_up_leaves_no_rank_behind(tmp_path, launcher, environ, died, work):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / launcher).write_text(LAUNCHER)
    above = subprocess.Popen(
        [sys.executable, tmp_path / launcher, tmp_path / "rank.py", work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )
    pid = int(above.stdout.readline())
    assert above.stdout.readline() == "ready\n"
    above.kill()
    if died:
        words = "stopped by the launcher's death during set-up; the same command goes on from there\n"
        assert above.stderr.read() == words  # to its end, which comes when the rank has ended
    else:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)  # it is there
    above.communicate()


INIT, SHELL, PYTHON = (1, [b"systemd"]), (1, [b"sh", b"-c"]), (1, [b"python3", b"my_launcher.py"])
LAUNCH = [b"python", b"-u", b"-m", b"deepspeed.launcher.launch", b"--world_info=x", b"--master_addr=127.0.0.1"]


@pytest.mark.parametrize(
    "parents, died",
    [
        ([INIT], True),
        ([SHELL], True),
        ([(77, [b"systemd", b"--user"])], True),
        ([PYTHON], False),  # a launcher of one's own, alone in its container
        ([(77, [b"bash", b"wrapper.sh"]), INIT], False),
        ([(77, [b"python", b"torchrun", b"--master_addr=127.0.0.1"]), INIT], False),  # in the background
        ([(77, LAUNCH), INIT], True),  # its runner has died
        ([(77, LAUNCH), (76, [b"python", b"deepspeed"]), INIT], False),
        ([(77, [*LAUNCH[:-1], b"--master_addr=node1"]), INIT], False),  # started through ssh
    ],
)
def test_a_launcher_that_died_before_it_could_be_seen(monkeypatch, parents, died):
    pids = [pid for pid, _ in parents] + [0, 0]
    monkeypatch.setattr(signals, "_words_of", lambda pid: dict(parents).get(pid, []))
    monkeypatch.setattr(signals, "_parent", lambda pid: pids[pids.index(pid) + 1])
    monkeypatch.setattr(signals.os, "getppid", lambda: pids[0])
    assert signals._orphan(signals._launcher()) == died


def test_children_are_left_alone(rank):
    """Forks heed none of a rank's signals but SIGTERM, which ends them without a word, as pools need."""
    work = """
import multiprocessing, signal
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
child.start()
time.sleep(0.2)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    os.kill(child.pid, number)
time.sleep(0.2)
assert child.is_alive()
child.terminate()
child.join(5)
print(child.exitcode)
"""
    process = rank(work)
    said, errors = process.communicate(timeout=20)
    assert said.splitlines()[-1] == "-15" and not errors and process.returncode == 0, errors


def test_a_stop_that_a_library_swallowed_is_raised_before_training():
    stop = StopRequest()
    try:
        with contextlib.suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"), stop.between_steps():
            pytest.fail("training began")
        assert not stop.training
    finally:
        stop.close()


def test_a_process_without_standard_error_works_as_any_other(tmp_path):
    """What engine/watchdog.py asks of it at each step needs a file; what a library writes must not go to a run's."""
    (tmp_path / "rank.py").write_text(RANK)
    work = "import faulthandler; faulthandler.dump_traceback_later(9, exit=True); os.write(2, b'x')"
    ended = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "", sys.executable, tmp_path / "rank.py", work])
    assert ended.returncode == 0
