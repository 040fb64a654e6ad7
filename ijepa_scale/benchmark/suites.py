"""pytest's suites as parts of a check: the tests that need a GPU, and the benchmarks of the kernels."""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from ijepa_scale.benchmark.timing import MEASUREMENTS, Say

ROOT = MEASUREMENTS.parents[1]
PROCESSES = 8  # most of a test's time is compilation on the host
SLOWEST = 10


def run_tests(*arguments: str, seconds: float, say: Say) -> dict[str, Any]:
    """Counts of what passed, failed and was skipped; each failure with its message; the slowest tests.

    seconds: after which no further test is begun, and that is a fault. Raises ValueError where there is no checkout
    whose tests could run, or pytest cannot run them.
    """
    if not (ROOT / "tests").is_dir():
        raise ValueError(f"the tests are those of a checkout, and there is none at {ROOT}; run it from a checkout")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # A test that fails would print its compiler's log, of thousands of lines.
        quiet = ["-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *quiet, f"--junitxml={report}"]
        command += [f"--session-timeout={seconds}", *arguments]
        say(" ".join(arguments))
        started = time.monotonic()
        # Started by another pytest it is no part of that: with xdist's variables it would time no benchmark.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if not report.exists():
            raise ValueError(f"pytest ended with code {done.returncode} and no report: {' '.join(command)}")
        found = of_report(report)
        if done.returncode and time.monotonic() - started > seconds:  # what has run to its end may have ended late
            found["faults"].append(f"the tests were stopped after {seconds:.0f} s: not all have run")
        elif done.returncode not in (0, 1):  # all passed, or some failed
            found["faults"].append(f"pytest ended with code {done.returncode}: not all have run")
        return found


def of_report(report: Path) -> dict[str, Any]:
    """What a JUnit file of pytest says."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, seconds = [], {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        wrong = [one for one in case if one.tag in ("failure", "error")]
        skipped = any(one.tag == "skipped" for one in case)
        counts["failed" if wrong else "skipped" if skipped else "passed"] += 1
        failures += [{"test": name, "message": (one.get("message") or "")[:1000]} for one in wrong]
        seconds[name] = float(case.get("time") or 0)
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:SLOWEST]
    return {
        **counts,
        "failures": failures,
        "slowest": {name: seconds[name] for name in slowest},
        "faults": [f"{one['test']}: {' '.join(one['message'].split())[:200]}" for one in failures]
        + ["no test passed"] * (not counts["passed"]),
    }
