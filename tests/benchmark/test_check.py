"""The check goes on after a part that fails, says which did, and runs whole at the least size."""

import json
import subprocess
import sys
import time

import pytest

from ijepa_scale.benchmark import check, suites
from ijepa_scale.benchmark.parts import PARTS
from ijepa_scale.verbs import gpu_check
from tests.processes import ROOT


@pytest.fixture
def parts(monkeypatch):
    """Parts that end as their codes say, with what they write before that; and what they are run with."""
    given: dict[str, tuple[int | None, dict[str, dict]]] = {}
    limits: list[tuple[str, float]] = []

    def in_a_process(code, *, limit, say):
        name, out = next(one for one in PARTS if f"'{one}'" in code), code.split("'")[3]
        limits.append((name, limit))
        ended, files = given.get(name, (0, {file: {} for file in PARTS[name].files}))
        for file, found in files.items():
            (check.Path(out) / f"{file}.json").write_text(json.dumps(found))
        return ended, ["a line", "RuntimeError: CUDA error"]

    monkeypatch.setattr(check, "in_a_process", in_a_process)
    return given, limits


def test_a_part_that_fails_is_named_and_the_next_goes_on(tmp_path, parts):
    given, limits = parts
    given["tests"] = (1, {})
    given["eager"] = (None, {"alone": {"faults": ["step 9 took 900 ms"]}})
    given["matmuls"] = (0, {"matmuls": {"faults": []}})
    (tmp_path / "trace.json").write_text('{"of": "an earlier check"}')
    said = []
    failed = check.run_check(tmp_path, list(PARTS), toy=True, say=said.append)
    assert failed == {
        "tests": "exit code 1: RuntimeError: CUDA error",
        "eager": "ended after its 120 s",
    }
    assert [name for name, _ in limits] == list(PARTS)
    assert all(limit <= PARTS[name].seconds for name, limit in limits)
    assert json.loads((tmp_path / "tests.json").read_text())["output"] == ["a line", "RuntimeError: CUDA error"]
    assert json.loads((tmp_path / "alone.json").read_text()) == {"faults": ["step 9 took 900 ms"]}, "it is kept"
    assert "error" in json.loads((tmp_path / "trace.json").read_text())
    written = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert list(written) == list(PARTS) and written["eager"]["faults"] == ["step 9 took 900 ms"]
    assert any(line.startswith("kernels: 0 s: well") for line in said)


def test_the_whole_has_its_time(tmp_path, parts, monkeypatch):
    assert sum(part.seconds for part in PARTS.values()) > check.SECONDS >= max(part.seconds for part in PARTS.values())
    assert max(part.seconds for part in PARTS.values()) <= 240
    _, limits = parts
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(check.time, "monotonic", lambda: float(next(clock)))
    failed = check.run_check(tmp_path, list(PARTS), toy=True, say=lambda text: None)
    assert failed and all("the time of the whole check was over" in said for said in failed.values())
    assert len(limits) + len(failed) == len(PARTS) and all(limit >= check.LEAST_SECONDS for _, limit in limits)


def test_what_hangs_is_ended_with_all_it_started():
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', %r])"
    started, said = time.monotonic(), []
    ended, lines = check.in_a_process(code % "import time; time.sleep(60)", limit=1.5, say=said.append)
    assert ended is None and lines == said == ["begun"] and time.monotonic() - started < 20


def test_what_breaks_ends_with_its_last_lines():
    ended, lines = check.in_a_process("print('a'); raise ValueError('no such GPU')", limit=30, say=lambda text: None)
    assert ended == 1 and lines[0] == "a" and lines[-1] == "ValueError: no such GPU"


def test_a_report_of_pytest_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one" time="0.5"/>'
        '<testcase classname="a" name="two" time="2.5"><failure message="assert 1 == 2">long</failure></testcase>'
        '<testcase classname="a" name="three" time="0"><skipped message="no"/></testcase>'
        '<testcase classname="a" name="four" time="0"><error message="no fixture"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = suites.of_report(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["faults"] == ["a::two: assert 1 == 2", "a::four: no fixture"]
    assert list(found["slowest"])[:2] == ["a::two", "a::one"]
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"><skipped/></testcase></testsuite></testsuites>'
    )
    assert suites.of_report(report)["faults"] == ["no test passed"]


def test_without_a_checkout_there_are_no_tests_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="from a checkout"):
        suites.run_tests("tests", seconds=9.0, say=lambda text: None)


@pytest.fixture
def run_suite(tmp_path, monkeypatch):
    """run_tests() of a checkout with one file of tests."""

    def run(body, *arguments, seconds):
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "test_it.py").write_text(body)
        monkeypatch.setattr(suites, "ROOT", tmp_path)
        return suites.run_tests(*arguments, "tests", seconds=seconds, say=lambda text: None)

    return run


@pytest.mark.slow
def test_a_suite_that_has_run_to_its_end_may_take_long_to_leave(run_suite):
    found = run_suite("import atexit, time\n\ndef test_it():\n    atexit.register(time.sleep, 10)\n", seconds=10.0)
    assert found["passed"] == 1 and not found["faults"]


@pytest.mark.slow
def test_a_suite_that_takes_too_long_is_stopped_and_says_so(run_suite):
    body = "import pytest, time\n\n@pytest.mark.parametrize('i', range(40))\ndef test_it(i):\n    time.sleep(0.25)\n"
    found = run_suite(body, "-n", "2", seconds=2.5)
    assert 0 < found["passed"] < 40 and found["failed"] == 0
    assert found["faults"] == ["the tests were stopped after 2 s: not all have run"]


@pytest.mark.slow
def test_a_suite_that_is_interrupted_says_so(run_suite):
    body = "import os, signal\n\ndef test_one(): pass\n\ndef test_two(): os.kill(os.getpid(), signal.SIGINT)\n"
    found = run_suite(body, seconds=60.0)
    assert found["faults"] == ["pytest ended with code 2: not all have run"]


@pytest.mark.parametrize(
    "arguments, words", [(["--parts", "device", "lunch"], "unknown parts lunch"), (["--toy"], "give --out FOLDER")]
)
def test_wrong_input(arguments, words, capsys):
    assert gpu_check.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_check_at_the_least_size(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "gpu_check.py"), "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS.values():
        for file in part.files:
            found = json.loads((tmp_path / f"{file}.json").read_text())
            assert found and "error" not in found and not found.get("faults"), file
    assert (tmp_path / "trace" / "trace.json.gz").is_file()
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"]
