"""Whatever is typed or written for a key: what it becomes, or what the error says."""

import itertools
import random
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.config import PretrainConfig, from_dict, load_config, to_dict
from ijepa_scale.config import to_yaml as config_to_yaml
from ijepa_scale.config.reading import NUMBERS_TOO, from_literal, leaves, over, read, to_yaml

TEXTS = [
    "set #2", "# x", "2024_01", "202401", "0x10", "1e3", ".5", "-1", "12:30:45", "2024-01-01", "on", "yes", "null", "~",
    "true", "", " x ", "a: b", "a=b", "=", "[]", "[1, 2]", "[a", "{a}", "{a: b}", "*a", "&a b", "!t", "@x", "%x", "`x`",
    "|", "> x", "- x", "? x", "it's", "a\"b", "'half", "a' and 'b", "\\", "\\\\", "${seed}", "\\${seed}", "$${x}", "${",
    "???", "\\???", "a\tb", "a\nb", "é漢", "https://h/train-{0000..0015}.tar",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    pieces = ["$", "{", "}", "\\", "?", "'", '"', "#", ":", " ", "a", "1", "_", ".", "e", "~", "-", "[", ",", "${seed}"]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(count)]


def is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]


def test_text_keys_take_overrides_as_they_are_typed_and_give_them_back(tmp_path):
    """As one config with a key for each text. What is written of it is read again as the same."""
    (tmp_path / "run.yaml").touch()
    texts = [text for text in TEXTS + random_texts(100) if not is_quoted(text) and not text.startswith("[{")]
    types = itertools.cycle([str, Any])
    schema = make_dataclass("Many", [(f"t{i}", hint, "") for i, hint in zip(range(len(texts)), types, strict=False)])
    config = read(schema, tmp_path / "run.yaml", [f"t{i}={text}" for i, text in enumerate(texts)])
    assert list(asdict(config).values()) == texts
    assert from_literal(schema, asdict(config)) == config
    (tmp_path / "written.yaml").write_text(to_yaml(asdict(config)), encoding="utf-8")
    assert read(schema, tmp_path / "written.yaml", []) == config


def test_a_run_s_config_is_read_again_as_it_was(tmp_path):
    """From config.yaml and from a manifest, whatever is in its texts."""
    (tmp_path / "run.yaml").write_text("run_dir: runs/${model.name}\ndata: {source: [{path: a}]}")
    config = load_config(tmp_path / "run.yaml", ["data.source=/d/${x} #1", "data.split=2024_01", "data.eval_split=???"])
    assert (config.data.source, config.data.split, config.data.eval_split) == ("/d/${x} #1", "2024_01", "???")
    assert config.run_dir == "runs/vit_huge" and from_dict(to_dict(config)) == config
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_quotes_around_all_of_an_override_are_no_part_of_it(tmp_path):
    """YAML asked for them in earlier versions."""
    (tmp_path / "run.yaml").touch()
    for typed, text in {"'/d/set #2'": "/d/set #2", '"a b"': "a b", '""': "", "''": "", "'a' 'b'": "'a' 'b'"}.items():
        assert load_config(tmp_path / "run.yaml", [f"data.source={typed}"]).data.source == text


@dataclass
class Part:
    name: str = "x"
    words: str = field(default="all", metadata=NUMBERS_TOO)
    many: Any = ""
    size: int = 3
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    label: str = ""
    fraction: float = 0.5


def read_as(folder: Path, text: str, *overrides: str) -> Whole:
    (folder / "x.yaml").write_text(text)
    return read(Whole, folder / "x.yaml", list(overrides))


def test_what_is_text_follows_from_the_types_of_any_config(tmp_path):
    assert [name for name, hint in leaves(Whole) if hint in (str, Any)] == [
        "part.name",
        "part.words",
        "part.many",
        "label",
    ]
    found = read_as(tmp_path, "", "part.name=1e3", "part[many]=on", "label=null", "part.size=1_0", "part.words=64")
    assert (found.part.name, found.part.many, found.label, found.part.size) == ("1e3", "on", "null", 10)
    assert found.part.words == read_as(tmp_path, "part: {words: 64}").part.words == "64"
    assert read_as(tmp_path, "", "part.many= [ {a: on}]").part.many == [{"a": True}]
    assert read_as(tmp_path, "label: ${part.name}${fraction}", "part.name=${x}").label == "${x}0.5"


@pytest.mark.parametrize(
    "text", ["202401", "2024_01", "on", "no", "True", "null", "~", "", "1e3", "0x10", ".inf", "!!int 3"]
)
def test_what_is_no_text_in_a_file_is_refused_with_the_quotes_that_it_needs(tmp_path, text):
    for key in ("name", "many"):
        with pytest.raises(ValueError) as caught:
            read_as(tmp_path, f"label: x\npart:\n  {key}: {text}\n")
        message, written = str(caught.value), text.split(" ")[-1]
        assert message.startswith(
            f"config key part.{key}: wants text, and YAML reads {written or 'nothing'} in {tmp_path}"
        )
        assert message.endswith(f'; write it in quotes: {key}: "{written}"') and "\n" not in message
        assert getattr(read_as(tmp_path, f'part: {{{key}: "{written}"}}').part, key) == written
        assert getattr(read_as(tmp_path, f"part: {{{key}: {text}}}", f"part.{key}=new").part, key) == "new"


def test_a_key_given_twice_is_refused_with_both_values(tmp_path):
    for overrides, words in {
        ("part.size=1", "part.size=2"): "config key part.size is given 2 times, '1' and '2': give it once",
        ("label=a", "part.size=1", "label=a"): "config key label is given 2 times, 'a' and 'a': give it once",
        ("part={size: 1}", "part.size=2"): "config key part.size is given 2 times, '{size: 1}' and '2'",
        ("part.size=2", "part={size: 1}"): "config key part.size is given 2 times, '2' and '{size: 1}'",
        ("part.settings.a=1", "part.settings={a: {b: 2}}"): "config key part.settings.a is given 2 times",
        ("part.settings={a: {b: 2}}", "part.settings.a=1"): "config key part.settings.a.b is given 2 times",
        ("part.name=a", "part[name]=b"): "config key part.name is given 2 times, 'a' and 'b'",
    }.items():
        with pytest.raises(ValueError) as caught:
            read_as(tmp_path, "", *overrides)
        assert str(caught.value).startswith(words)
    both = read_as(
        tmp_path, "part: {size: 5}", "part={words: a}", "part.name=b", "part.settings.a=1", "part.settings.b=2"
    )
    assert (both.part.size, both.part.words, both.part.name, both.part.settings) == (5, "a", "b", {"a": 1, "b": 2})


@pytest.mark.parametrize(
    "names, quoted",
    [
        ([f"/d/train-{i:04}.tar" for i in range(4)], "/d/train-000{0..3}.tar"),
        ([f"/d/train-{i:04}.tar" for i in range(8, 12)], "/d/train-00{08..11}.tar"),
        ([f"/d/{i}" for i in range(1, 3)], "/d/{1..2}"),
        (["/d/a.tar", "/d/bc.tar"], "/d/{a,bc}.tar"),
        (["a", "b"], ""),
    ],
)
def test_braces_that_the_shell_expanded_are_shown_in_quotes(tmp_path, names, quoted):
    from ijepa_scale.data.sources.inspection import expand_braces

    with pytest.raises(ValueError) as caught:
        read_as(tmp_path, "", *(f"label={name}" for name in names))
    message = str(caught.value)
    assert repr(names[0]) in message and repr(names[-1]) in message
    if quoted:
        assert message.endswith(f"quote the braces: 'label={quoted}'") and expand_braces(quoted) == names
    else:
        assert message.endswith("give it once")


def test_what_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "old.yaml"
    for encoding, line in {"latin-1": 2, "utf-16": 1}.items():
        path.write_bytes("# x\nrun_dir: café".encode(encoding))
        with pytest.raises(ValueError, match=f"old.yaml is not UTF-8 text: byte 0x.. in line {line}; save it as UTF-8"):
            load_config(path)
    path.write_bytes("\ufeffrun_dir: café\r\n".encode())
    assert load_config(path).run_dir == "café"
    with pytest.raises(ValueError, match=r"override 'run_dir=caf\\udce9' is not UTF-8 text"):
        load_config(tmp_path / "old.yaml", ["run_dir=caf\udce9"])


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("run_dir: ~/runs/a\ndata: {cache_dir: ~}".replace("~}", '"~"}'))
    config = load_config(tmp_path / "run.yaml")
    assert (config.run_dir, config.data.cache_dir) == (f"{tmp_path}/runs/a", str(tmp_path))
    config = load_config(tmp_path / "run.yaml", ["run_dir=~/b", "data.cache_dir=~/c", "data.source=~/d"])
    assert (config.run_dir, config.data.cache_dir, config.data.source) == (f"{tmp_path}/b", f"{tmp_path}/c", "~/d")
    assert PretrainConfig(run_dir="./~/b").run_dir == "./~/b"
    assert PretrainConfig(run_dir="~of-no-user").run_dir == "~of-no-user"  # a folder, as for a shell
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"run_dir: no home folder is known for ~/b; give another"):
        PretrainConfig(run_dir="~/b")


def test_a_number_for_a_source_in_what_earlier_versions_wrote():
    values = to_dict(PretrainConfig())
    values["data"]["source"] = 202401
    assert from_dict(values).data.source == "202401"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """As the settings of a task of an evaluation."""

    k: tuple[int, ...] = (10, 20)
    labels: tuple[str, ...] = ("1%",)
    lr: float = 0.1
    subset: str = ""
    features: bool = False

    def __post_init__(self):
        if self.lr <= 0.0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


def test_words_over_the_values_of_a_dataclass():
    """Over those that it holds, which need not be the defaults."""
    settings = Probe(lr=0.5, k=(3,))
    assert over(settings, []) == settings
    changed = over(settings, ["labels=[1%,2,5]", "subset=/d/${x} #1", "features=true"])
    assert changed == Probe(lr=0.5, k=(3,), labels=("1%", "2", "5"), subset="/d/${x} #1", features=True)
    assert isinstance(changed.k, tuple) and isinstance(changed.labels, tuple)
    assert over(settings, ["k=[5, 7]", "lr=1e-3"]) == Probe(lr=1e-3, k=(5, 7))
    assert settings == Probe(lr=0.5, k=(3,))


def test_texts_that_settings_hold_stay_as_they_are():
    for text in ("${x}", "???", "a: b", r"\${x}", "3"):
        assert over(Probe(subset=text), ["lr=2.0"]) == Probe(subset=text, lr=2.0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["kk=3"], "unknown config key kk; did you mean k"),
        (["epochs=3"], "unknown config key epochs; valid here: k, labels, lr, subset, features"),
        (["k=3"], r"config key k is a list: give k=\[3\]"),
        (["k=3,5"], r"config key k is a list: give k=\[3,5\]"),
        (["k.a=3"], r"config key k is a list: give k=\[\.\.\.\]"),
        (["k=[few]"], "config key k.*: .* could not be converted to Integer"),
        (["lr=0"], "lr must be above 0, got 0.0"),
        (["lr=fast"], "config key lr: Value 'fast' .* could not be converted to Float"),
        (["lr.a=1"], "lr"),
        (["features=perhaps"], "config key features: Value 'perhaps' is not a valid bool"),
        (["lr"], "override 'lr' is not of the form key.sub=value"),
        (["lr=1", "lr=2"], "config key lr is given 2 times, '1' and '2'"),
        (["k=[1"], r"k=\[1: while parsing a flow sequence"),
    ],
)
def test_wrong_words_over_a_dataclass(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        over(Probe(), words)
    assert "\n" not in str(caught.value)
