"""The command of an installed package, from a checkout; the package itself: test_installed.py."""

import subprocess
import sys

import pytest

from ijepa_scale.verbs import command
from tests.processes import ROOT


def start(*words):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_every_verb_has_its_launch_script_and_its_command_with_the_same_help():
    verbs = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
    assert sorted(command.VERBS) == verbs
    scripts = [start(f"launch/{verb}.py", "--help") for verb in verbs]
    commands = [start("-m", "ijepa_scale.verbs.command", "--local_rank=1", verb, "--help") for verb in verbs]
    for verb, script, called in zip(verbs, scripts, commands, strict=True):
        text, other = script.communicate()[0], called.communicate()[0]
        assert text.startswith(f"usage: launch/{verb}.py ") and other.startswith(f"usage: ijepa-scale {verb} ")
        assert text.partition("\n\n")[2] == other.partition("\n\n")[2] != ""
        assert (script.returncode, called.returncode) == (0, 0)


def test_what_is_no_verb_is_answered_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["train"])
    assert end.value.code == 2 and "'pretrain'" in capsys.readouterr().err
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert all(f"  {verb} " in said for verb in command.VERBS)
