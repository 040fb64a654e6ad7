import dataclasses
import io
import tarfile
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import (
    ATTENTION,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimizationConfig,
    PredictorConfig,
    PretrainConfig,
    ReportConfig,
)
from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.sources import remote
from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models import attention_self_test
from ijepa_scale.models.attention import packed_attention_reference
from ijepa_scale.models.attention_backends import BACKENDS, Choice
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.vit import VIT_SIZES
from ijepa_scale.plan.dry_run import dry_run
from tests.data.small_sources import IMAGE, WHOLE, encoded, number_of, write_images, write_parquet, write_tar


def config_of(**sections):
    return PretrainConfig(
        **{
            "data": DataConfig(image_size=24),
            "model": ModelConfig(name="vit_tiny", patch_size=4, width=16, depth=2, heads=2),
            "predictor": PredictorConfig(width=8, depth=1),
            **sections,
        }
    )


@pytest.mark.parametrize("name", VIT_SIZES)
def test_a_named_size(name):
    assert build.vit_size(ModelConfig(name=name)) == VIT_SIZES[name]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"depth": 3}, (192, 3, 3, 768)),
        ({"heads": 6}, (192, 12, 6, 768)),
        ({"mlp_width": 100}, (192, 12, 3, 100)),
        ({"width": 96}, (96, 12, 3, 384)),  # the mlp follows the width
        ({"width": 96, "mlp_width": 100, "depth": 1, "heads": 4}, (96, 1, 4, 100)),
    ],
)
def test_explicit_sizes_win(overrides, expected):
    width, depth, heads, mlp_width = expected
    size = build.vit_size(ModelConfig(name="vit_tiny", **overrides))
    assert size == ViTSize(width=width, depth=depth, heads=heads, mlp_width=mlp_width)


@pytest.mark.parametrize(
    "policy, encoder, predictor",
    [
        ("none", [], []),
        ("predictor", [], [1, 2]),
        ("every_2", [2, 4], [1, 2]),
        ("every_3", [3], [1, 2]),
        ("full", [1, 2, 3, 4], [1, 2]),
    ],
)
def test_activation_checkpointing_and_compile_reach_the_blocks(policy, encoder, predictor):
    config = config_of(
        engine=EngineConfig(activation_checkpointing=policy, compile=policy == "none"),
        model=ModelConfig(name="vit_tiny", patch_size=4, width=16, heads=2, depth=4),
        predictor=PredictorConfig(width=8, depth=2),
    )
    model = build.build_model(config)
    for blocks, expected in ((model.context_encoder.blocks, encoder), (model.predictor.predictor_blocks, predictor)):
        assert [i for i, block in enumerate(blocks, 1) if block.recomputed] == expected
        assert all(block.compiled == (policy == "none") for block in blocks)
    assert not any(block.recomputed for block in model.target_encoder.blocks)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match=r"unknown model.name 'vit_enormous'; choose one of vit_tiny, vit_small"):
        build.vit_size(ModelConfig(name="vit_enormous"))
    with pytest.raises(ValueError, match="width a multiple of its heads"):
        build.vit_size(ModelConfig(name="vit_tiny", heads=5))


def test_the_model_is_what_the_config_says():
    model = build.build_model(config_of(loss=LossConfig(kind="l2"), seed=5))
    assert model.loss_kind == "l2"
    for encoder in (model.context_encoder, model.target_encoder):
        assert encoder.size == ViTSize(width=16, depth=2, heads=2, mlp_width=64)
        assert encoder.grid == PatchGrid(6, 6) and encoder.patch_embed.proj.weight.shape == (16, 3, 4, 4)
    assert model.predictor.size == ViTSize(width=8, depth=1, heads=2, mlp_width=32)  # the encoder's heads
    assert model.predictor.predictor_pos_embed.shape == (1, 36, 8)
    assert model.predictor.predictor_embed.in_features == model.predictor.predictor_proj.out_features == 16
    assert all(torch.equal(source, target) for source, target in model.twins())
    other = build.build_model(config_of(predictor=PredictorConfig(width=8, depth=1, heads=4), seed=5))
    assert other.predictor.size.heads == 4 and other.loss_kind == "smooth_l1"


CPU = torch.device("cpu")


def test_every_kernel_can_be_asked_for_by_name():
    assert set(ATTENTION) == {"auto", "sdpa", *BACKENDS}


def test_a_cpu_attends_by_the_definition():
    choices = build.build_attention(config_of(), device=CPU)
    assert choices.name == "sdpa" and choices.attend == {"encoder": None, "predictor": None}
    bf16 = EngineConfig(precision="bf16")
    asked = config_of(model=dataclasses.replace(config_of().model, attention="fa2"), engine=bf16)
    with pytest.raises(ValueError, match=r"^model.attention=fa2 needs a CUDA device"):
        build.build_attention(asked, device=CPU)
    asked = config_of(predictor=dataclasses.replace(config_of().predictor, attention="fa3"), engine=bf16)
    with pytest.raises(ValueError, match=r"^predictor.attention=fa3 needs a CUDA device; or set it to auto$"):
        build.build_attention(asked, device=CPU)


@pytest.mark.parametrize(
    "model, predictor, wanted",
    [
        ("auto", "", ["auto", "auto"]),
        ("fa2", "", ["fa2", "fa2"]),
        ("fa3", "torch_varlen", ["fa3", "torch_varlen"]),
        ("sdpa", "auto", ["sdpa", "auto"]),
    ],
)
def test_each_network_has_its_kernel_by_its_own_heads(monkeypatch, model, predictor, wanted):
    """No kernel takes the predictor's heads, 10 wide; that is no matter of the encoder's."""
    asked = []

    def pick(name, *, key, device, dtype, head_width):
        asked.append((key, name, head_width))
        kernel = name != "sdpa" and head_width % 8 == 0
        return Choice("fa2", packed_attention_reference, "auto") if kernel else Choice("sdpa", None, "its heads")

    monkeypatch.setattr(attention_self_test, "choose_attention", pick)
    config = config_of(
        model=ModelConfig(name="vit_tiny", patch_size=4, width=48, heads=2, attention=model),
        predictor=PredictorConfig(width=40, heads=4, attention=predictor),
        engine=EngineConfig(precision="bf16"),
    )
    choices = build.build_attention(config, device=CPU)
    assert asked == [("model.attention", wanted[0], 24), ("predictor.attention", wanted[1], 10)]
    assert choices.name == ("sdpa" if model == "sdpa" else "encoder: fa2, predictor: sdpa")
    built = build.build_model(config, attend=choices.attend)
    assert built.context_encoder.attend is choices.attend["encoder"] and built.predictor.attend is None
    assert built.target_encoder.attend is None


def test_a_kernel_is_tested_at_the_model_s_heads_and_longest_sequence_and_reaches_what_is_packed(monkeypatch):
    calls = set()

    def attend(qkv, sequences):
        assert sequences.num_tokens == sequences.cu_seqlens[-1] == len(qkv)
        calls.add((*qkv.shape[2:], sequences.max_seqlen))
        return packed_attention_reference(qkv, sequences) * factor

    fa2 = Choice("fa2", attend, "asked for")
    monkeypatch.setattr(attention_self_test, "choose_attention", lambda *wanted, **facts: fa2)
    config = config_of(
        model=ModelConfig(name="vit_tiny", patch_size=4, width=48, heads=2),
        predictor=PredictorConfig(width=32, heads=4),
        engine=EngineConfig(precision="bf16"),
    )
    factor = 1
    attends = build.build_attention(config, device=CPU).attend
    assert attends == {"encoder": attend, "predictor": attend}
    assert calls == {(2, 24, 36), (4, 8, 36)}
    model = build.build_model(config, attend=attends)
    assert model.context_encoder.attend is model.predictor.attend is attend
    factor = 1.1
    with pytest.raises(ValueError, match=r"^model.attention=fa2 on cpu at head width 24 gives a wrong output"):
        build.build_attention(config, device=CPU)


def test_weights_are_a_function_of_the_seed():
    models = [build.build_model(config_of(seed=seed)).state_dict() for seed in (5, 5, 6)]
    name = "context_encoder.blocks.1.attn.qkv.weight"
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not torch.equal(models[0][name], models[2][name])


def test_architecture_says_what_fixes_the_shapes():
    config = config_of()
    assert build.build_ijepa(config).architecture() == {
        "image_size": 24,
        "patch_size": 4,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "mlp_width": 64,
        "predictor_width": 8,
        "predictor_depth": 1,
        "predictor_heads": 2,
        "target_layers": [2],
    }
    for change in (
        {"data": DataConfig(image_size=48)},
        {"model": dataclasses.replace(config.model, mlp_width=60)},
        {"predictor": PredictorConfig(width=8, depth=1, heads=1)},
        {"loss": LossConfig(target_layers=[1])},
    ):
        assert build.build_ijepa(config_of(**change)).architecture() != build.build_ijepa(config).architecture()


def test_blocks_carry_the_mask_section():
    mask = MaskConfig(
        num_target_blocks=3,
        target_scale=(0.1, 0.3),
        target_aspect_ratio=(0.5, 2.0),
        context_scale=(0.7, 0.9),
        min_keep=2,
        reference_compat=True,
    )
    blocks = build.build_blocks(config_of(mask=mask))
    assert blocks.grid == PatchGrid(6, 6)
    shared = [item.name for item in dataclasses.fields(blocks) if item.name != "grid"]
    assert {name: getattr(blocks, name) for name in shared} == {name: getattr(mask, name) for name in shared}


def test_a_grid_too_small_for_min_keep_is_refused():
    config = config_of(data=DataConfig(image_size=32))
    with pytest.raises(ValueError, match=r"mask.min_keep 10 on the 8 x 8 patch grid cannot be met") as caught:
        build.build_objective(config).check()
    works = int(str(caught.value).split("mask.min_keep <= ")[1].split(",")[0])
    build.build_objective(dataclasses.replace(config, mask=MaskConfig(min_keep=works))).check()
    with pytest.raises(ValueError, match="1 x 1 patch grid is too small to mask"):
        build.build_blocks(config_of(data=DataConfig(image_size=4)))


@pytest.mark.parametrize(
    "options, images, expected",
    [
        # steps an epoch, horizon, stop, warm-up
        ({}, 1_281_167, (625, 187_500, 187_500, 25_000)),
        ({"global_batch_size": 10, "epochs": 3, "warmup_epochs": 1}, 99, (9, 27, 27, 9)),
        ({"global_batch_size": 10, "epochs": 3, "warmup_epochs": 0.5}, 100, (10, 30, 30, 5)),
        ({"max_steps": 600}, 1_281_167, (625, 600, 600, 80)),
        ({"max_steps": 600, "stop_at_step": 100}, 1_281_167, (625, 600, 100, 80)),
        ({"max_steps": 600, "stop_at_step": 900}, 1_281_167, (625, 600, 600, 80)),
        ({"warmup_epochs": 0}, 1_281_167, (625, 187_500, 187_500, 0)),
        ({"epochs": 40}, 2048, (1, 40, 40, 40)),
    ],
)
def test_horizon(options, images, expected):
    horizon = build.build_horizon(config_of(optimization=OptimizationConfig(**options)), images)
    assert (horizon.steps_per_epoch, horizon.total, horizon.stop, horizon.warmup) == expected


@pytest.mark.parametrize(
    "whole, micro, ranks, expected", [(2048, 0, 16, 128), (2048, 32, 16, 32), (6, 0, 1, 6), (6, 3, 2, 3), (8, 0, 8, 1)]
)
def test_micro_batch_size(whole, micro, ranks, expected):
    config = config_of(optimization=OptimizationConfig(global_batch_size=whole, micro_batch_size=micro))
    assert build.build_micro_batch_size(config, ranks) == expected


@pytest.mark.parametrize("whole, micro, ranks", [(100, 0, 3), (100, 30, 1), (4, 0, 8), (2048, 100, 16), (1, 7, 1)])
def test_a_global_batch_that_cannot_be_cut_is_refused_and_the_advice_works(whole, micro, ranks):
    config = config_of(optimization=OptimizationConfig(global_batch_size=whole, micro_batch_size=micro))
    with pytest.raises(ValueError, match=rf"global_batch_size {whole} is not a multiple of .* {ranks} ranks") as caught:
        build.build_micro_batch_size(config, ranks)
    advised = int(str(caught.value).split("optimization.global_batch_size=")[1].split()[0])
    config = config_of(optimization=OptimizationConfig(global_batch_size=advised, micro_batch_size=micro))
    assert advised % (build.build_micro_batch_size(config, ranks) * ranks) == 0


def test_a_run_needs_a_source():
    with pytest.raises(ValueError, match=r"data.source is not set: .*data.source=scenes for rendered scenes"):
        build.build_images(config_of())


def source_config(source, tmp_path, *, steps=4, **data):
    return config_of(
        data=DataConfig(image_size=8, source=source, cache_dir=str(tmp_path / "cache"), **data),
        optimization=OptimizationConfig(global_batch_size=4, max_steps=steps),
        run_dir=str(tmp_path / "run"),
    )


def test_sources_mixed_by_weight(tmp_path):
    """One alone, in a list or not, is no mixture; labels are looked for in all of them."""
    write_images(tmp_path / "a", range(8))
    for i in range(2):
        write_images(tmp_path / f"b/{i}", range(20 + 6 * i, 26 + 6 * i))
    (a, b) = ({"path": str(tmp_path / name), "weight": weight} for name, weight in (("a", 0.3), ("b", 0.1)))
    mixture = build.build_images(source_config([a, b], tmp_path))
    assert isinstance(mixture, Mixture)
    assert (mixture.weights, len(mixture), [len(part) for part in mixture.parts]) == ((3, 1), 20, [8, 12])
    assert isinstance(build.build_images(source_config([a], tmp_path)), ImageSet)
    evaluation = build.build_eval_images(source_config([a, b], tmp_path))
    assert evaluation.train.name == "b:train" and not evaluation.held_out
    assert build.build_eval_images(source_config([a], tmp_path)).train.name == "a:train"


def test_streams_and_how_long_they_are(tmp_path):
    write_tar(tmp_path / "t/train.tar", range(8), label=True)
    write_tar(tmp_path / "t/val.tar", range(10, 14), label=True)
    config = source_config(str(tmp_path / "t"), tmp_path, streaming=True, steps=0)
    streams = build.build_images(config)
    assert isinstance(streams, Streams) and len(streams) == 0 and streams.seed == config.seed
    with pytest.raises(ValueError, match=r"set optimization\.max_steps, or data\.num_images"):
        build.build_horizon(config, len(streams))
    assert build.build_horizon(source_config("x", tmp_path, streaming=True), 0).total == 4
    told = source_config(str(tmp_path / "t"), tmp_path, streaming=True, steps=0, num_images=8)
    assert build.build_horizon(told, len(build.build_images(told))).steps_per_epoch == 2
    two = [{"path": str(tmp_path / "t")}, {"path": str(tmp_path / "t")}]
    told = source_config(two, tmp_path, streaming=True, steps=0, num_images=12)
    assert build.build_horizon(told, len(build.build_images(told))).steps_per_epoch == 3
    few = source_config(str(tmp_path / "t"), tmp_path, streaming=True, num_images=3)
    with pytest.raises(ValueError, match="t:train has 3 images, fewer than"):
        build.build_images(few)
    evaluation = build.build_eval_images(config)
    assert (evaluation.train.name, evaluation.test.name, evaluation.held_out) == ("t:train", "t:validation", True)
    assert evaluation.test.label_columns()["label"].values.tolist() == [1, 2, 0, 1]
    assert len(list((tmp_path / "run/samples").iterdir())) == 2 and not (tmp_path / "cache").exists()


def test_no_more_of_a_stream_is_copied_than_is_looked_at(tmp_path):
    write_tar(tmp_path / "t.tar", range(8))
    config = source_config(str(tmp_path / "t.tar"), tmp_path, streaming=True)
    unseen = dataclasses.replace(
        config, logging=LoggingConfig(health_every_steps=0), report=ReportConfig(train_images=0)
    )
    assert len(build.build_eval_images(config).train) == 8
    assert len(build.build_eval_images(unseen).train) == 1
    logging = LoggingConfig(health_every_steps=0, pictures_every_steps=10)
    assert len(build.build_eval_images(dataclasses.replace(unseen, logging=logging)).test) == 8


@pytest.mark.parametrize("ending, call", [("parquet", build.build_images), ("tar", build.build_eval_images)])
def test_an_address_that_is_wrong_is_not_waited_for_as_long_as_a_network_that_fails(
    tmp_path, monkeypatch, ending, call
):
    waits: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits)))
    config = source_config(f"http://127.0.0.1:9/x.{ending}", tmp_path, streaming=True)
    assert config.data.retry_seconds > 100
    with pytest.raises(ValueError, match=r"x\.\w+ cannot be read: .*refused.*gave up"):
        call(config)
    assert 0 < sum(waits) < 40
    waits.clear()
    with pytest.raises(ValueError, match="gave up"):
        call(source_config(f"http://127.0.0.1:9/x.{ending}", tmp_path, streaming=True, retry_seconds=2))
    assert 0 < sum(waits) < 5


def test_shards_whose_images_cannot_be_read_are_found_before_training(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(8):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"wrong"))
    with pytest.raises(ValueError, match=r"x\.tar:train: 8 of 8 images sampled cannot be used"):
        build.build_eval_images(source_config(str(tmp_path / "x.tar"), tmp_path, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_column_and_configuration_reach_whatever_reads_the_source(tmp_path, streaming):
    """Training, what is evaluated and the dry run; a sample of another column is no sample of this one."""
    for name, first in (("a/train", 0), ("a/val", 20), ("b/x", 40)):
        masks = [{"bytes": encoded(100 + i), "path": None} for i in range(first, first + 5)]
        write_parquet(tmp_path / f"s/{name}.parquet", range(first, first + 5), mask=pa.array(masks, IMAGE))
    splits = "[{split: train, path: a/train*}, {split: val, path: a/val*}]"
    card = f"configs:\n- config_name: a\n  data_files: {splits}\n- {{config_name: b, data_files: b/*}}\n"
    (tmp_path / "s/README.md").write_text(f"---\n{card}---\n")

    def numbers(images):
        if isinstance(images, Streams):
            return sorted(number_of(image) for _, _, image in images.take(0, [WHOLE] * 5)[0])
        return [number_of(images.read(i)) for i in range(len(images))]

    for column, more in (("", 0), ("mask", 100), ("image", 0)):
        config = source_config(str(tmp_path / "s"), tmp_path, column=column, config="a", streaming=streaming)
        evaluation = build.build_eval_images(config)
        assert numbers(build.build_images(config)) == list(range(more, more + 5)) == numbers(evaluation.train)
        assert numbers(evaluation.test) == list(range(more + 20, more + 25))
    wrong = {"no column 'masks'": {"column": "masks", "config": "a"}, "several configurations: a, b": {}}
    for words, chosen in (*wrong.items(), ("no configuration 'c', but a, b", {"config": "c"})):
        config = source_config(str(tmp_path / "s"), tmp_path, streaming=streaming, **chosen)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=64))  # masks fit
        for refuses in (build.build_images, build.build_eval_images, dry_run):
            with pytest.raises(ValueError, match=words):
                refuses(config)
    config = source_config(str(tmp_path / "s"), tmp_path, config="b", streaming=streaming)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=64))
    assert "images         5 in" in dry_run(config)
