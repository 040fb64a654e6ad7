import dataclasses
import difflib
import json
import typing

import pytest

from ijepa_scale.config import (
    PretrainConfig,
    changed_keys,
    from_dict,
    load_config,
    loading,
    sections,
    to_dict,
    to_yaml,
    valid_keys,
)


@pytest.fixture
def load(tmp_path):
    def load(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, list(overrides))

    return load


def test_defaults_are_the_paper_s(load):
    """ViT-H/14 on ImageNet-1k: arXiv:2301.08243, appendix A.1, and the released configuration where they differ."""
    config = load()
    assert (config.data.image_size, config.data.crop_scale, config.data.horizontal_flip) == (224, (0.3, 1.0), False)
    assert (config.model.name, config.model.patch_size) == ("vit_huge", 14)
    assert (config.predictor.width, config.predictor.depth, config.predictor.heads) == (384, 12, 0)
    mask = config.mask
    assert (mask.num_target_blocks, mask.target_scale, mask.target_aspect_ratio) == (4, (0.15, 0.2), (0.75, 1.5))
    assert (mask.context_scale, mask.min_keep, mask.context, mask.reference_compat) == ((0.85, 1.0), 10, "all", False)
    assert config.loss.kind == "smooth_l1"
    options = config.optimization
    assert (options.global_batch_size, options.epochs, options.warmup_epochs) == (2048, 300, 40)
    assert (options.start_lr, options.lr, options.final_lr) == (2e-4, 1e-3, 1e-6)
    assert (options.weight_decay, options.ema, options.betas) == ((0.04, 0.4), (0.996, 1.0), (0.9, 0.999))
    assert options.clip_grad_norm == 0.0
    assert dataclasses.replace(config, run_dir="") == PretrainConfig()


def test_file_and_overrides(load):
    config = load(
        """
        data: {source: scenes, crop_scale: [0.5, 1]}
        model: {name: vit_tiny}
        optimization:
          lr: 5e-4
          epochs: 50
        engine:
          deepspeed: {zero_optimization: {reduce_bucket_size: 1000}}
        """,
        "optimization.epochs=60",
        "mask.context=64",
        "data.horizontal_flip=true",
        "optimization.betas=[0.8,0.9]",
        "engine.deepspeed.prescale_gradients=true",
        "data.source=/data/a=b",
    )
    assert config.data.source == "/data/a=b" and config.data.crop_scale == (0.5, 1.0)
    assert config.data.horizontal_flip is True
    assert (config.model.name, config.model.patch_size) == ("vit_tiny", 14)
    assert (config.optimization.lr, config.optimization.epochs) == (5e-4, 60)
    assert config.optimization.betas == (0.8, 0.9) and isinstance(config.optimization.betas, tuple)
    assert config.mask.context == "64"
    assert config.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}, "prescale_gradients": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_the_run_folder_is_named_after_the_file(load):
    assert load().run_dir == "runs/run"
    assert load("run_dir: elsewhere").run_dir == "elsewhere"
    assert load("", "run_dir=/tmp/x").run_dir == "/tmp/x"


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        # an unknown key, with the nearest valid one
        ("optimization: {lrr: 1.0}", [], r"unknown config key optimization.lrr; did you mean optimization.lr\?"),
        ("optimisation: {lr: 1.0}", [], r"unknown config key optimisation; did you mean optimization\?"),
        ("", ["mask.contxt=all"], r"unknown config key mask.contxt; did you mean mask.context\?"),
        ("", ["lr=1e-3"], r"unknown config key lr; did you mean optimization.lr\?"),
        ("", ["data.image_sise=3"], r"unknown config key data.image_sise; did you mean data.image_size\?"),
        ("qqq: 1", [], r"unknown config key qqq; valid here: data, model, objective, predictor"),
        ("loss: {qqq: 1}", [], r"unknown config key loss.qqq; valid here: kind"),
        ("1: 2", [], "unknown config key 1;"),
        # a wrong type
        ("optimization: {lr: fast}", [], "config key optimization.lr: Value 'fast' of type 'str' could"),
        ("optimization: {epochs: 1.5}", [], "config key optimization.epochs: Value '1.5'"),
        ("data: {horizontal_flip: maybe}", [], "config key data.horizontal_flip: Value 'maybe' is not a valid bool"),
        ("data: {source: null}", [], "config key data.source: wants text, and YAML reads null in .* source: \"null\"$"),
        ("data: {source: [a]}", [], "config key data.source: a list wants .*path.*weight.* got 'a'"),
        ("data: {source: []}", [], r"config key data.source: .*got \[\]"),
        ("", ["data.source=[{path:/a,weight:3}]"], "config key data.source: .*a space after each colon"),
        ("", ["data.source=[{path: /a, weight: 0}]"], "config key data.source: .*the weight above 0"),
        ("", ["data.source=[{path: /a, weight: true}]"], "config key data.source: .*the weight above 0"),
        ("", ["data.source=[{path: /a, weight: x}]"], "config key data.source: .*the weight above 0"),
        ("", ["data.source=[{path: /a, share: 1}]"], "config key data.source: .*share"),
        ("", ["data.shuffle_buffer=0"], "data.shuffle_buffer must be 1 or more"),
        ("", ["data.retry_seconds=-1"], "data.retry_seconds must be 0 or more"),
        ("", ["data.workers=true"], "config key data.workers: Value 'True'"),
        ("", ["engine.deepspeed=3"], "config key engine.deepspeed: "),
        ("", ["data.image_size=${nothing}"], "config key data.image_size: .*'nothing' not found"),
        # tuples
        ("mask: {target_scale: [0.1]}", [], "config key mask.target_scale: .*length 1 does not match .*length 2"),
        ("mask: {target_scale: [0.1, 0.2, 0.3]}", [], "config key mask.target_scale: .*length 3"),
        ("", ["optimization.betas=[0.9]"], "config key optimization.betas: .*length 1"),
        ("mask: {target_scale: 0.1}", [], "config key mask.target_scale: .*float is not"),
        ("mask: {target_scale: [a, b]}", [], "config key mask.target_scale: a value in it could not be converted"),
        ("", ["mask.target_scale.0=0.1"], r"config key mask.target_scale"),
        # not a section, and the reverse
        ("data: 5", [], "config key data is a section and takes keys, got 5"),
        ("data:", [], "config key data is a section and takes keys, got None"),
        ("", ["mask=0.3"], "config key mask is a section and takes keys, got 0.3"),
        ("", ["data.source.name=x"], "config key data.source: "),
        ("- a\n- b", [], "run.yaml must hold sections of keys, got a ListConfig"),
        # not YAML
        ("data: {source: x", [], "run.yaml or an override is not valid YAML"),
        ("data:\n source: a\n  split: b", [], "run.yaml or an override is not valid YAML"),
        ("seed: 1\nseed: 2", [], "not valid YAML: .*duplicate key seed"),
        ("", ["data.image_size=[1"], "override is not valid YAML"),
        ("", ["fast"], "override 'fast' is not of the form key.sub=value"),
        ("", ["--resume"], "override '--resume' is not of the form"),
        # values out of range, and values that do not fit together
        ("data: {crop_scale: [0.5, 0.3]}", [], r"data.crop_scale must satisfy .*, got \[0.5, 0.3\]"),
        ("data: {crop_scale: [0.0, 0.3]}", [], "data.crop_scale must satisfy"),
        ("data: {image_size: 0}", [], "data.image_size must be 1 or more, got 0"),
        ("data: {workers: -1}", [], "data.workers must be 0 or more"),
        ("data: {max_bad_fraction: 1.5}", [], "data.max_bad_fraction must lie in 0..1"),
        ("data: {image_size: 225}", [], "data.image_size 225 is not a multiple of model.patch_size 14"),
        ("model: {patch_size: 0}", [], "model.patch_size must be 1 or more, got 0"),
        ("predictor: {attention: fa5}", [], "predictor.attention must be one of auto, .*, or empty: as model"),
        ("model: {attention: fa5}", [], "model.attention must be auto, fa2, .*, triton or sdpa, got 'fa5'"),
        ("model: {depth: -2}", [], "model.depth must be 0 or more, got -2"),
        ("objective: {name: ijeba}", [], "objective.name must be ijepa, .*, cae or sketch, got 'ijeba'"),
        ("predictor: {width: 0}", [], "predictor.width must be 1 or more, got 0"),
        ("mae: {decoder_heads: 0}", [], "mae.decoder_heads must be 1 or more, got 0"),
        ("cae: {alignment: -1}", [], "cae.alignment must be 0 or more, got -1.0"),
        ("mae: {mask_ratio: 1}", [], "mae.mask_ratio must lie between 0 and 1, .* got 1.0"),
        ("mae: {mask_ratio: 0.5}", [], "the section mae is of objective.name=mae and this is ijepa, which takes mask"),
        ("mask: {target_scale: [0.3, 0.2]}", [], "mask.target_scale must satisfy"),
        ("mask: {context_scale: [0.3, 1.2]}", [], "mask.context_scale must satisfy"),
        ("mask: {target_aspect_ratio: [0, 1]}", [], "mask.target_aspect_ratio must satisfy"),
        ("mask: {num_target_blocks: 0}", [], "mask.num_target_blocks must be 1 or more"),
        ("mask: {min_keep: 0}", [], "mask.min_keep must be 1 or more"),
        ("mask: {context: some}", [], "mask.context must be all, batch_min or a number .*, got 'some'"),
        ("mask: {context: 0}", [], "mask.context must be all"),
        ("mask: {context: ²}", [], "mask.context must be all"),
        ("loss: {kind: l1}", [], "loss.kind must be smooth_l1 or l2, got 'l1'"),
        ("", ["optimization.epochs=3", "optimization.warmup_epochs=4"], r"must lie in 0..epochs \(3\), got 4"),
        ("optimization: {ema: [0.9, 0.8]}", [], "optimization.ema must satisfy"),
        ("", ["optimization.optimizer=sgd"], "optimization.optimizer must be adamw or muon, got 'sgd'"),
        ("optimization: {ema: [.nan, 1.0]}", [], "optimization.ema must satisfy"),
        ("optimization: {betas: [0.9, 1.0]}", [], "optimization.betas must lie in 0..1"),
        ("optimization: {weight_decay: [0.1, -0.1]}", [], "optimization.weight_decay must be 0 or more"),
        ("optimization: {lr: -1e-3}", [], "optimization.lr must be 0 or more"),
        ("optimization: {lr: .nan}", [], "optimization.lr must be 0 or more, got nan"),
        ("optimization: {global_batch_size: 0}", [], "optimization.global_batch_size must be 1 or more"),
        ("optimization: {max_steps: -1}", [], "optimization.max_steps must be 0 or more"),
        ("engine: {zero_stage: 0}", [], "engine.zero_stage must be 1, 2 or 3, got 0: .*use 1"),
        ("engine: {offload_optimizer: nvme}", [], "must be none or cpu, got 'nvme'"),
        ("engine: {zero_stage: 4}", [], "engine.zero_stage must be 1, 2 or 3, got 4$"),
        ("engine: {precision: fp16}", [], "engine.precision must be auto, fp32 or bf16, got 'fp16'"),
        ("engine: {activation_checkpointing: every_1}", [], "none, predictor, full, or every_N with N from 2"),
        ("engine: {activation_checkpointing: every_nth}", [], "got 'every_nth'"),
        ("checkpoint: {every_steps: 0}", [], "checkpoint.every_steps must be 1 or more"),
        ("checkpoint: {keep_last: 0}", [], "checkpoint.keep_last must be 1 or more"),
        ("checkpoint: {keep_every: -1}", [], "checkpoint.keep_every must be 0 or more"),
        ("logging: {wandb: 'on'}", [], "logging.wandb must be disabled, offline or online"),
        ("logging: {health_images: 8}", [], "logging.health_images must be 32 or more"),
        ("logging: {pictures_every_steps: -1}", [], "logging.pictures_every_steps must be 0 or more, got -1"),
        ("logging: {health_every_steps: -1}", [], "logging.health_every_steps must be 0 or more"),
        ("report: {train_images: -1}", [], "report.train_images must be 0 or more"),
        ("seed: -1", [], "seed must be 0 or more .*, got -1"),
        ("", [f"seed={2**64}"], f"seed must be .* less than .*, got {2**64}"),
        ("", [f"seed={2**63}"], f"seed must be .* less than .*, got {2**63}"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_the_key(load, text, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)


def test_a_config_is_a_file_or_a_name(tmp_path, monkeypatch):
    """From any folder; a file that is there goes before the package's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", "configs/tiny.yaml"):
        config = load_config(name, ["seed=3"])
        assert (config.model.name, config.seed, config.run_dir) == ("vit_tiny", 3, "runs/tiny")
    (tmp_path / "tiny.yaml").write_text("seed: 5")
    assert load_config("tiny.yaml").seed == 5
    for wrong in ("configs/big.yaml", "big", "configs", "elsewhere/tiny.yaml"):
        with pytest.raises(
            ValueError, match=rf"^no config file {wrong}; give a YAML file, .* tiny, .*, vith14"
        ) as caught:
            load_config(wrong)
        assert "\n" not in str(caught.value)


def values_of(section, prefix=""):
    """Every leaf of a config, by its full key: a slow twin of valid_keys()."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from values_of(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def test_valid_keys_are_all_leaves():
    assert valid_keys() == [key for key, _ in values_of(PretrainConfig())]


CHANGED = {
    "data.source": "x", "data.image_size": 448, "data.crop_scale": (0.2, 0.9), "model.name": "vit_tiny",
    "mask.context": "50", "loss.kind": "l2", "optimization.lr": 3e-4, "optimization.ema": (0.99, 1.0),
    "engine.deepspeed": {"a": {"b": [1, 2.5, "c"]}}, "engine.precision": "bf16", "run_dir": "r", "seed": 7,
}  # fmt: skip


def with_values(changes):
    config = PretrainConfig()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section or name: value})
    return config


def test_round_trips(load, tmp_path):
    config = with_values(CHANGED)
    values = to_dict(config)
    assert json.loads(json.dumps(values)) == values
    assert from_dict(values) == config
    assert from_dict(to_dict(PretrainConfig())) == PretrainConfig()
    assert load(to_yaml(config)) == config
    assert from_dict({}) == PretrainConfig()
    assert values["optimization"]["ema"] == [0.99, 1.0]


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"data": {"imagesize": 3}, "new": {"a": 1}},
            "not know: data.imagesize, new.a; .* later version",
        ),
        ({"data": {"image_size": "x"}}, "^config key data.image_size: .*could not be converted to Integer$"),
        ({"mask": {"target_scale": [0.1]}}, "config key mask.target_scale: .*length 1"),
        ({"data": None}, "config key data is a section"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_from_dict_complains_as_load_config_does(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_changed_keys():
    old = to_dict(PretrainConfig())
    assert changed_keys(old, old) == {}
    changed = changed_keys(old, to_dict(with_values(CHANGED)))
    free = ("run_dir", "engine.zero_stage", "engine.deepspeed")
    assert set(changed) == {key for key in CHANGED if key not in free} | {"engine.deepspeed.a.b"}
    assert changed["optimization.lr"] == (1e-3, 3e-4)
    assert changed["data.crop_scale"] == ([0.3, 1.0], [0.2, 0.9])
    # A key that the version of the program that wrote the checkpoint did not have yet means its default.
    del old["loss"]["kind"], old["data"]["column"]
    assert changed_keys(old, to_dict(PretrainConfig())) == {}
    changed = changed_keys(old, to_dict(with_values({"loss.kind": "l2", "data.column": "photo"})))
    assert changed == {"loss.kind": ("smooth_l1", "l2"), "data.column": ("", "photo")}


def different(value):
    """Another value of the same type; validity does not matter, as none is built from it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [9, 9] if isinstance(value, (list, tuple)) else {"x": 1} if isinstance(value, dict) else value + "x"


FREE = {
    "run_dir", "data.workers", "data.retry_seconds", "data.cache_dir", "data.eval_split", "data.max_bad_fraction",
    "data.max_pixels",
    "model.attention", "model.init_from", "predictor.attention",
    "optimization.micro_batch_size", "optimization.stop_at_step", "engine.zero_stage", "engine.hang_seconds",
    "engine.activation_checkpointing", "engine.compile", "engine.offload_optimizer",
    "checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.asynchronous",
    "logging.wandb", "logging.wandb_project", "logging.health_every_steps", "logging.health_images",
    "logging.pictures_every_steps", "report.train_images", "report.test_images",
}  # fmt: skip


@pytest.mark.parametrize("key", valid_keys())
def test_a_key_is_free_to_change_or_it_is_reported(key):
    """data.num_images is how many scenes there are, so it is not free."""
    old, new = to_dict(PretrainConfig()), to_dict(PretrainConfig())
    section, _, name = key.rpartition(".")
    values = new[section] if section else new
    values[name] = different(values[name])
    reported = "engine.deepspeed.x" if key == "engine.deepspeed" else key
    assert list(changed_keys(old, new)) == ([] if key in FREE else [reported])


def test_names_of_earlier_versions_are_read_in_checkpoints_and_files(load, monkeypatch):
    """A key, a whole section, and a section whose last key moved away."""
    names = {"mask.keep": "mask.min_keep", "terms": "loss", "optimizer.rate": "optimization.lr"}
    monkeypatch.setattr(loading, "RENAMED", names)
    old = {"mask": {"keep": 3, "context": "64"}, "terms": {"kind": "l2", "variance": 0.5}, "optimizer": {"rate": 0.5}}
    config = from_dict(old)
    assert (config.mask.min_keep, config.mask.context, config.loss.kind, config.loss.variance) == (3, "64", "l2", 0.5)
    assert config.optimization.lr == 0.5
    assert changed_keys(old, to_dict(config)) == {}
    assert changed_keys(old, to_dict(PretrainConfig()))["loss.kind"] == ("l2", "smooth_l1")
    text = "mask: {keep: 3, context: 64}\nterms: {kind: l2, variance: 0.5}\noptimizer: {rate: 0.5}"
    assert load(text, "run_dir=") == dataclasses.replace(config, run_dir="runs/run")
    for both in ({"mask": {"keep": 3, "min_keep": 3}}, {"loss": {"kind": "l2"}, "terms": {"kind": "l2"}}):
        with pytest.raises(ValueError, match="is given twice, once by an old name"):
            from_dict(both)


def test_a_checkpoint_of_a_later_version_is_refused():
    with pytest.raises(ValueError, match=r"does not know: mask.new; it is of a later version: install that one"):
        changed_keys({"mask": {"new": 1}}, to_dict(PretrainConfig()))


def test_a_config_takes_the_sections_of_its_own_objective_alone(monkeypatch):
    monkeypatch.setitem(sections.OBJECTIVE_SECTIONS, "other", ("loss",))
    other = sections.ObjectiveConfig(name="other")
    assert PretrainConfig(objective=other).objective.name == "other"
    message = r"^the section mask is of objective.name=ijepa and this is other, which takes loss; leave mask out"
    with pytest.raises(ValueError, match=message):
        PretrainConfig(objective=other, mask=sections.MaskConfig(min_keep=3))


def test_every_misspelt_key_is_answered_with_a_near_one(load):
    """One letter left out of the middle of each key."""
    for key in valid_keys():
        section, _, name = key.rpartition(".")
        if len(name) < 5:
            continue
        wrong = f"{section}." * bool(section) + name[: len(name) // 2] + name[len(name) // 2 + 1 :]
        with pytest.raises(ValueError, match="did you mean") as caught:
            load("", f"{wrong}=1")
        suggested = str(caught.value).split("did you mean ")[1].rstrip("?")
        assert difflib.SequenceMatcher(None, suggested, wrong).ratio() > 0.8
        assert suggested in [*valid_keys(), *typing.get_type_hints(PretrainConfig)]


def test_sources_mixed_by_weight(tmp_path):
    """In YAML and on the command line; what is written is what was read."""
    (tmp_path / "a.yaml").write_text("data:\n  source:\n    - {path: /data/a, weight: 0.5}\n    - path: /data/b\n")
    config = load_config(tmp_path / "a.yaml")
    assert config.data.mixed_sources == [("/data/a", 0.5), ("/data/b", 1)]
    assert from_dict(to_dict(config)) == config
    config = load_config(tmp_path / "a.yaml", ["data.source=[{path: /c, weight: 3}, {path: /d, weight: 1}]"])
    assert config.data.mixed_sources == [("/c", 3), ("/d", 1)]
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "b.yaml", ["run_dir=" + config.run_dir]) == config
    assert load_config(tmp_path / "a.yaml", ["data.source=/e"]).data.mixed_sources == [("/e", 1)]
    changed = changed_keys(to_dict(config), to_dict(load_config(tmp_path / "a.yaml")))
    assert list(changed) == ["data.source"]
