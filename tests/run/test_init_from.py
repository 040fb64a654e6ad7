"""Training that starts from other weights: what is taken from what, on real ranks, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.engine.distributed import alone
from ijepa_scale.exchange.load import load
from ijepa_scale.exchange.networks import Loaded, Networks
from ijepa_scale.models.vit import VIT_SIZES
from ijepa_scale.run import init_from
from ijepa_scale.run.report import plain_encoder
from ijepa_scale.verbs import pretrain
from tests.end_to_end.runs import Runs, steps_of
from tests.exchange.test_load import stored
from tests.objectives.pixels import pretrain_pixels
from tests.processes import assert_all, run_ranks

ONE_STEP = ("optimization.stop_at_step=1", "checkpoint.every_steps=1")
STILL = (*ONE_STEP, "optimization.lr=0", "optimization.start_lr=0", "optimization.final_lr=0", "optimization.ema=[1,1]")


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    return Runs(small_config, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def source(runs, tmp_path_factory):
    """A run of 8 steps, at a rate at which its target encoder is far from its context encoder."""
    folder = tmp_path_factory.mktemp("source") / "run"
    runs(folder, "optimization.stop_at_step=8", "optimization.start_lr=1e-2", "optimization.lr=1e-2", ranks=1)
    newest = folder / "checkpoints" / "step-00000008"
    master, ema = (stored(newest, kind, "context_encoder.") for kind in ("master", "ema"))
    assert max((master[name] - ema[name]).abs().max() for name in master) > 1e-2
    return folder


def weights_of(run, kind, prefix=""):
    return stored(run / "checkpoints" / "step-00000001", kind, prefix)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 5
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def first_loss(config, source):
    """By a plain model that holds the source's networks."""
    model = build.build_model(config)
    for network, module in (("context", model.context_encoder), ("target", model.target_encoder)):
        module.load_state_dict(load(source, network).network.state_dict())
    model.predictor.load_state_dict(load(source, "predictor").network.state_dict())
    images = build.build_images(config)
    objective = build.build_objective(config)
    batches = build.build_micro_batches(config, images, objective, micro_batch_size=8, rank=0, ranks=1)
    batch = batches.batch(0)
    with torch.no_grad():
        return model(batch.images, batch.masks)["loss"].item()


CASES = [
    (2, 3, "fp32"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (1, 1, "fp32"),
            (1, 2, "fp32"),
            (1, 3, "fp32"),
            (2, 1, "fp32"),
            (2, 2, "fp32"),
            (2, 1, "bf16"),
            (2, 3, "bf16"),
        ]
    ),
]


@pytest.mark.parametrize("ranks, stage, precision", CASES)
def test_the_first_weights_are_the_source_s(runs, source, tmp_path, ranks, stage, precision):
    """Masters, and the target encoder as the source's target encoder is; after a step that moves nothing."""
    options = (f"model.init_from={source}", f"engine.zero_stage={stage}", f"engine.precision={precision}")
    ends = runs(tmp_path / "run", *options, *STILL, "optimization.weight_decay=[0,0]", "seed=5", ranks=ranks)
    newest = source / "checkpoints" / "step-00000008"
    for kind in ("master", "ema"):
        assert_same(weights_of(tmp_path / "run", kind), stored(newest, kind, ""))
    line = (
        f"model.init_from: {newest} at step 8: context encoder from its context encoder, target encoder from its "
        "target encoder, predictor from its predictor\n"
    )
    assert [end.output.count(line) for end in ends] == [1] + [0] * (ranks - 1)
    assert "no warm-up is configured" not in ends[0].output
    if precision == "fp32":
        config = load_config(runs.config, ["seed=5"])
        expected = first_loss(config, source)
        assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected, abs=2e-6)


def test_a_run_that_is_resumed_needs_its_source_no_more(runs, source, tmp_path):
    """Also where the key is another one by then; the first of its weights are known by its checkpoints all the same."""
    shutil.copytree(source, tmp_path / "gone")
    run = tmp_path / "run"
    (end,) = runs(run, f"model.init_from={tmp_path / 'gone'}", "optimization.warmup_epochs=0", *ONE_STEP, ranks=1)
    assert "advice: no warm-up is configured" in end.output and "set optimization.warmup_epochs=1 " in end.output
    shutil.rmtree(tmp_path / "gone")
    two = ("optimization.warmup_epochs=0", "optimization.stop_at_step=2", "checkpoint.every_steps=1")
    (end,) = runs(run, f"model.init_from={tmp_path / 'elsewhere'}", *two, ranks=1)
    assert "model.init_from is not read: the run goes on from a checkpoint" in end.output
    manifests = [json.loads((run / f"checkpoints/step-0000000{step}/manifest.json").read_text()) for step in (1, 2)]
    assert manifests[0]["init_from"] == manifests[1]["init_from"] and [step["step"] for step in steps_of(run)] == [0, 1]
    where = str(tmp_path / "gone" / "checkpoints" / "step-00000008")
    assert {name: (of["network"], of["path"]) for name, of in manifests[0]["init_from"].items()} == {
        name: (name, where) for name in ("context", "target", "predictor")
    }


def test_another_resolution_and_another_predictor(runs, source, tmp_path):
    """The encoders are taken up, the predictor is drawn anew."""
    options = ("data.image_size=40", "predictor.heads=4")
    more = ("optimization.weight_decay=[0,0]", "report.train_images=24", "report.test_images=12")
    (end,) = runs(tmp_path / "run", f"model.init_from={source}", *options, *more, *STILL, ranks=1)
    assert "predictor fresh (that one is another: heads 2 there, 4 here)" in end.output
    assert "; position embeddings are for 40 px, there they are for 32 px" in end.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["initial"].startswith("the weights that training started from, of ")
    assert [score["difference"] for score in report["scores"]] == [0, 0]  # nothing has moved
    for kind in ("master", "ema"):
        theirs = stored(source / "checkpoints" / "step-00000008", kind, "context_encoder.")
        assert_same(weights_of(tmp_path / "run", kind, "context_encoder."), theirs)
    objective = build.build_objective(load_config(runs.config, list(options)))
    fresh = {
        name: objective.initial_weight(f"predictor.{name}", p.shape).flatten()
        for name, p in objective.build().predictor.named_parameters()
    }
    assert_same(weights_of(tmp_path / "run", "master", "predictor."), fresh)


@pytest.mark.slow
def test_an_objective_without_a_target_takes_the_encoder_alone(runs, tmp_path):
    own = ("model.depth=1", "model.mlp_width=64", "optimization.stop_at_step=4")
    runs(tmp_path / "source", *own, ranks=1)
    options = (str(runs.config), f"run_dir={tmp_path / 'run'}", f"model.init_from={tmp_path / 'source'}", *STILL)
    more = ("engine.zero_stage=3", "optimization.weight_decay=[0,0]")
    ends = run_ranks(pretrain_pixels, 2, tmp_path / "output", *options, *more)
    assert_all(ends)
    assert "context encoder from its context encoder, head fresh" in ends[0].output
    theirs = stored(tmp_path / "source" / "checkpoints" / "step-00000004", "master", "context_encoder.")
    assert_same(weights_of(tmp_path / "run", "master", "encoder."), theirs)


def test_what_cannot_be_started_from_is_one_error_on_every_rank(runs, source, tmp_path):
    ends = runs(tmp_path / "run", "model.init_from=nowhere", ranks=2, code=2)
    assert ends[0].output.count("error") == 1
    assert "error: model.init_from: there is no nowhere; give a run folder or one of its checkpoints" in ends[0].output


def overrides_in(message):
    return [word.rstrip(",") for word in message.partition("to start from it give ")[2].split() if "=" in word]


@pytest.mark.parametrize(
    "there, here",
    [
        (["model.width=48", "model.heads=3"], []),
        (["model.depth=3", "model.patch_size=8"], ["model.mlp_width=32"]),
        ([f"model.{key}=0" for key in ("width", "depth", "heads")], ["model.width=64"]),
        (["model.patch_size=5", "data.image_size=40"], []),
    ],
)
def test_sizes_that_differ_are_named_with_what_would_fit(small_config, tmp_path, monkeypatch, there, here):
    theirs = load_config(small_config, there)
    loaded = Loaded(
        network=build.build_encoder(theirs),
        name="context",
        image_size=theirs.data.image_size,
        path=tmp_path,
        sha256="",
    )
    monkeypatch.setattr(init_from, "load", lambda path, network: loaded)
    words = [*here, f"model.init_from={tmp_path}", "predictor.width=24"]  # which all of these heads divide
    config = load_config(small_config, words)
    with pytest.raises(ValueError, match=f"model.init_from={tmp_path} does not fit this config: ") as refused:
        init_from.check(config, build.build_objective(config))
    message = str(refused.value)
    if "model.width=48" in there:
        assert "width 48 there, 32 here; heads 3 there, 2 here; mlp_width 192 there, 128 here; patch_emb" in message
        assert (
            "patch_embed.proj.weight (48, 3, 4, 4) there, (32, 3, 4, 4) here; " in message and " more; to " in message
        )
    given = overrides_in(message)
    assert ("model.name=vit_tiny" in given) == (build.vit_size(theirs.model) in VIT_SIZES.values())
    keys = {word.partition("=")[0] for word in given}
    shown = load_config(small_config, [*(word for word in words if word.partition("=")[0] not in keys), *given])
    assert build.vit_size(shown.model) == build.vit_size(theirs.model)
    init_from.check(shown, build.build_objective(shown))


class OneEncoder:
    """As a file of another project, which holds encoders alone. missing: of these."""

    def __init__(self, config, missing=()):
        torch.manual_seed(0)
        self.encoder, self.image_size = build.build_encoder(config), config.data.image_size
        self.names = tuple(name for name in ("target", "context") if name not in missing)

    def load(self, path, network):
        def read(name):
            about = {"name": name, "image_size": self.image_size, "path": Path(path), "sha256": name}
            return Loaded(network=self.encoder, notes=("n",), **about)

        return Networks(path=Path(path), names=self.names, read=read).load(network)


@pytest.mark.parametrize("missing", [(), ("target",), ("context",)])
def test_both_encoders_start_from_the_one_that_there_is(small_config, monkeypatch, missing):
    config = load_config(small_config, ["model.init_from=timm:x"])
    source = OneEncoder(config, missing)
    monkeypatch.setattr(init_from, "load", source.load)
    note, *notes, line = init_from.preview(config)
    expected = {(): ("context", "target"), ("target",): ("context",) * 2, ("context",): ("target",) * 2}[missing]
    assert note == "n" and line == (
        f"model.init_from: timm:x: context encoder from its {expected[0]} encoder, target encoder from its "
        f"{expected[1]} encoder, predictor fresh (timm:x holds no predictor; it holds: {', '.join(source.names)})"
    )
    assert len(notes) == len(missing)


def test_learned_position_embeddings_are_refused(small_config, monkeypatch):
    config = load_config(small_config, ["model.init_from=x"])
    source = OneEncoder(config)
    monkeypatch.setattr(init_from, "load", source.load)
    source.encoder.pos_embed.copy_(source.encoder.pos_embed.bfloat16())  # a file may be of rounded ones
    init_from.check(config, build.build_objective(config))
    source.encoder.pos_embed += 0.02 * torch.randn(source.encoder.pos_embed.shape)
    with pytest.raises(ValueError, match=r"x has position embeddings of its own, up to 0\.\d+ from the fixed"):
        init_from.check(config, build.build_objective(config))


def test_the_report_compares_with_what_training_started_from(small_config, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config = load_config(small_config, [f"model.init_from={tmp_path / 'source'}"])
    objective, account = build.build_objective(config), init_from.Account(config)
    for part in init_from.parts_of(objective)[0]:
        account.add(part.name, *init_from.read_part(config, part))

    def initial(facts):
        encoder, network = plain_encoder(objective)
        return init_from.fill_initial(encoder, objective, network, alone(), facts), dict(encoder.named_parameters())

    words, weights = initial(account.facts)
    assert words.startswith("the weights that training started from, of ") and words.endswith("step-00000008")
    assert_same(weights, dict(load(source, "target").network.named_parameters()))
    fresh = {name: objective.initial_weight(f"context_encoder.{name}", p.shape) for name, p in weights.items()}
    changed = {name: {**of, "sha256": "another"} for name, of in account.facts.items()}
    assert_same(initial({})[1], fresh)
    assert initial({})[0] == "the encoder's random weights"
    assert initial(changed)[0].endswith("step-00000008 has changed since")
    assert_same(initial(changed)[1], fresh)
    shutil.rmtree(tmp_path / "source")
    words, weights = initial(account.facts)
    assert words.startswith("random weights, not those that training started from: there is no ")
    assert_same(weights, fresh)


def test_a_dry_run_says_it_and_refuses_it(small_config, source, capsys):
    def verb(*words):
        options = pretrain.parser().parse_intermixed_args(["--config", str(small_config), "--dry-run", *words])
        return pretrain.train(None, options, pretrain.config_of)

    assert verb(f"model.init_from={source}") == 0
    assert "step-00000008 at step 8: context encoder from its context encoder" in capsys.readouterr().out
    assert verb(f"model.init_from={source}", "model.depth=3") == 2
    assert "depth 2 there, 3 here" in capsys.readouterr().err
