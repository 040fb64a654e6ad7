"""A check of a GPU in eight minutes: parts one after the other, each in a process of its own and within its time.

A part that hangs, or breaks its CUDA context, ends alone: its error is written in its place, and the next one goes on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ijepa_scale.benchmark.parts import PARTS, Check
from ijepa_scale.benchmark.timing import MEASUREMENTS, Say
from ijepa_scale.data.files import write_whole

SECONDS = 480.0  # for all parts together
CPU_SLACK = 4.0  # times as long a CPU may take, for the toy sizes that it runs
LEAST_SECONDS = 10.0  # without which no part is begun: as long as it takes to import what it needs
READ_SECONDS = 5.0
KEPT_LINES = 30  # of a part's output, with its error


def run_check(out: Path, names: Sequence[str], *, toy: bool, say: Say, slack: float = 1.0) -> dict[str, str]:
    """Run parts by name; what is wrong with those that failed, by part. Writes out/FILE.json as each part has it.

    out/check.json says of each part how it went. slack: times as long each, and all together, may take.
    """
    out.mkdir(parents=True, exist_ok=True)
    started, parts = time.monotonic(), {}
    for name in names:
        left = slack * SECONDS - (time.monotonic() - started)
        parts[name] = run_part(name, out, toy=toy, limit=min(slack * PARTS[name].seconds, left), say=say)
        said = parts[name].get("error") or "; ".join(parts[name]["faults"]) or "well"
        say(f"{name}: {parts[name]['seconds']:.0f} s: {said}")
        write_whole(out / "check.json", json.dumps({"seconds": time.monotonic() - started, "parts": parts}, indent=1))
    return {
        name: part.get("error") or "; ".join(part["faults"])
        for name, part in parts.items()
        if part.get("error") or part["faults"]
    }


def run_part(name: str, out: Path, *, toy: bool, limit: float, say: Say) -> dict[str, Any]:
    """One part in a process of its own: its seconds, files, faults and, if it did not come to its end, error."""
    paths = [out / f"{file}.json" for file in PARTS[name].files]
    for path in paths:  # of an earlier check
        path.unlink(missing_ok=True)
    if limit < LEAST_SECONDS:
        return {"seconds": 0.0, "files": [], "faults": [], "error": "not run: the time of the whole check was over"}
    started = time.monotonic()
    call = f"from ijepa_scale.benchmark import check; check.part_process({name!r}, {str(out)!r}, toy={toy})"
    code, lines = in_a_process(call, limit=limit, say=lambda line: say(f"{name}: {line}"))
    part: dict[str, Any] = {"seconds": time.monotonic() - started}
    found = {path.name: json.loads(path.read_text()) for path in paths if path.exists()}
    part |= {"files": list(found), "faults": [one for each in found.values() for one in each.get("faults", [])]}
    if code != 0:
        part["error"] = f"ended after its {limit:.0f} s" if code is None else f"exit code {code}: {''.join(lines[-1:])}"
        error = {"error": part["error"], "output": lines}
        for path in paths:
            if not path.exists():
                write_whole(path, json.dumps(error, indent=1) + "\n")
    return part


def in_a_process(code: str, *, limit: float, say: Say) -> tuple[int | None, list[str]]:
    """Run Python code: (its exit code, None where the limit ended it; its last lines), each said as it comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, which ends with it
    )
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    reader = threading.Thread(target=_read, args=(process.stdout, lines, say), daemon=True)
    reader.start()
    try:
        ended: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        ended = None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(READ_SECONDS)  # a process that left the group may hold the output open
    return ended, list(lines)


def _read(output: IO[str], lines: deque[str], say: Say) -> None:
    for line in output:
        if line.strip():
            lines.append(line.rstrip())
            say(line.rstrip())


def environment() -> dict[str, str]:
    """A part's: this package is found from any folder, memory is taken as training takes it, the profiler is quiet."""
    root = MEASUREMENTS.parents[1]
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    plain = {"PYTHONPATH": os.pathsep.join(paths), "KINETO_LOG_LEVEL": "99", "PYTHONUNBUFFERED": "1"}
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        plain["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return {**os.environ, **plain}


def part_process(name: str, out: str, *, toy: bool) -> None:
    """A part, in its process."""
    check = Check(Path(out), toy, print)
    for file, found in PARTS[name].run(check):
        write_whole(check.out / f"{file}.json", json.dumps(found, indent=1) + "\n")
