"""SLURM for tests: sbatch, srun and scontrol that start real processes on this machine, as far as launch/ uses them.

sbatch [--array=0-1] [--OPTION=VALUE] SCRIPT WORDS... runs a copy of the script, as SLURM does, to its end, and again
where it was requeued; the tasks of an array all at once. SIGUSR1 to it goes to the tasks of the running step alone.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sbatch", "srun", "scontrol")


def on_path(folder: Path) -> dict[str, str]:
    """Environment in which these commands are found, and keep in folder what they have to know of one another."""
    for name, words in {"python": "", **{name: f"{__file__} {name}" for name in NAMES}}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def sbatch(words: list[str]) -> int:
    count = next(i for i, word in enumerate(words) if not word.startswith("-"))
    script, given = Path(words[count]), words[count + 1 :]
    header = re.findall(r"^#SBATCH --(\S+)$", script.read_text(), re.MULTILINE)
    options = dict(word.lstrip("-").partition("=")[::2] for word in [*header, *words[:count]])
    assert {"requeue", "signal"} <= options.keys() and options[
        "signal"
    ] == "USR1@120"  # to the steps, not to the script
    first, _, last = options.get("array", "").partition("-")
    tasks = [str(task) for task in range(int(first), int(last) + 1)] if first else [""]
    spooled = Path(os.environ["FAKE_SLURM"], "slurm_script")
    shutil.copy(script, spooled)
    job_words = [json.dumps(options), str(spooled), *given]
    running = [
        subprocess.Popen([sys.executable, __file__, "job", str(100 + i), task, *job_words])
        for i, task in enumerate(tasks)
    ]
    signal.signal(signal.SIGUSR1, lambda *_: [one.send_signal(signal.SIGUSR1) for one in running])
    return max(one.wait() for one in running)


def job(number: str, task: str, options: str, script: str, *words: str) -> int:
    """One job, and again where it is requeued."""
    given, requeued = json.loads(options), Path(os.environ["FAKE_SLURM"], f"requeue-{number}")
    environ = {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": str(int(given["nodes"]) * int(given["ntasks-per-node"])),
        "SLURM_CPUS_PER_TASK": given["cpus-per-task"],
        "SLURM_PROCID": "0",  # of the script itself
        **({"SLURM_ARRAY_TASK_ID": task} if task else {}),
    }
    pid = Path(os.environ["FAKE_SLURM"], f"step-{number}")
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(int(pid.read_text()), signal.SIGUSR1))
    while True:
        code = subprocess.run(["bash", script, *words], env={**os.environ, **environ}).returncode
        if not requeued.exists():
            return code
        requeued.unlink()


def srun(words: list[str]) -> int:
    """The tasks of a step; where one fails the others are ended if so asked for. The highest exit code."""
    kill = "--kill-on-bad-exit=1" in words
    count = int(os.environ["SLURM_NTASKS"])
    Path(os.environ["FAKE_SLURM"], f"step-{os.environ['SLURM_JOB_ID']}").write_text(str(os.getpid()))
    command = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_TASKS": str(count)},
        )
        for i in range(count)
    ]
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    while any(task.poll() is None for task in tasks):
        if kill and any(task.poll() for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.1)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print(words[2].replace(",", "\n"))
        return 0
    assert words[0] == "requeue", words
    Path(os.environ["FAKE_SLURM"], f"requeue-{words[1]}").touch()
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    sys.exit(job(*rest) if name == "job" else {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[name](rest))
