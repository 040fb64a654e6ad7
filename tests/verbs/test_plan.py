"""launch/plan.py: what it prints, and what it refuses."""

import shlex

import pytest

from ijepa_scale.config import load_config
from ijepa_scale.plan import sampling
from ijepa_scale.verbs.plan import main
from ijepa_scale.verbs.pretrain import parser as pretrain_parser

SMALL = ("model.depth=2", "predictor.depth=2")
ON_64 = ("--config", "vitb16", "--gpus", "64", "--gpu", "a100-80g", *SMALL)


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED_STEPS", 4)


def test_it_says_first_what_to_run_then_the_tables_then_what_is_assumed(capsys):
    assert main([*ON_64, "data.source=/data/imagenet", "--price", "2.5"]) == 0
    text = capsys.readouterr().out
    order = [text.index(words) for words in ("64 x a100-80g", "Run this", "Time:", "Memory of a GPU", "Assumed:")]
    assert order == sorted(order)
    tables = text.splitlines()
    assert max(map(len, tables)) <= 100
    assert "slots=8" in text and "at 2.5 a GPU-hour" in text and "cost" in text and "SOURCE" not in text
    for option in ("--mfu", "--interconnect", "--link-efficiency", "--overlap", "--memory"):
        assert option in text[text.index("Assumed:") :]


def test_recommend_prints_a_command_that_pretrain_takes(capsys):
    assert main([*ON_64, "optimization.lr=5e-4", "optimization.micro_batch_size=1", "--recommend"]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert words[:4] == ["deepspeed", "--hostfile", "hostfile", "launch/pretrain.py"]
    options = pretrain_parser().parse_intermixed_args(words[4:])
    config = load_config(options.config, options.overrides)
    assert config.optimization.lr == 5e-4 and config.data.source == "SOURCE"
    assert 64 * config.optimization.micro_batch_size <= config.optimization.global_batch_size
    for gpus, start in (("1", "python launch"), ("8", "deepspeed --num_gpus 8 launch")):
        assert main(["--config", "vitb16", "--gpus", gpus, "--gpu", "h100", "--recommend", *SMALL]) == 0
        assert capsys.readouterr().out.startswith(start)


def test_a_password_in_a_setting_is_not_printed(capsys):
    source = ("data.source=https://me:p4ssw0rd@host/{0..1}.tar", "data.streaming=true")
    assert main([*ON_64, *source, "--recommend"]) == 0
    assert "@host/{0..1}.tar" in (text := capsys.readouterr().out) and "p4ssw0rd" not in text
    assert main([*ON_64, "data.source=s3://me:p4ssw0rd@host/x", "optimization.lr=https://me:p4ssw0rd@host"]) == 2
    assert "@host" in (text := capsys.readouterr().err) and "p4ssw0rd" not in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*ON_64[:2], "--gpu", "h100"), "give --gpus N, or --sweep"),
        ((*ON_64, "--sweep", "8,16"), "give --gpus N, or --sweep"),
        ((*ON_64, "--price", "-1"), "must not be negative"),
        ((*ON_64, "--memory", "0.1", "--recommend"), "nothing fits"),
        ((*ON_64, "--mfu", "40"), "is a share"),
        (("--config", "vitb16", "--gpus", "100", "--gpu", "h100", "--gpus-per-node", "100"), "use 64 GPUs"),
    ],
)
def test_what_cannot_be_planned_ends_in_one_line(arguments, words, capsys):
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_where_nothing_fits_it_says_what_the_least_takes(capsys):
    assert main([*ON_64, "--memory", "0.1", "--all"]) == 0
    text = capsys.readouterr().out
    assert "Nothing fits: the least is" in text and "\n>" not in text and "!" in text
