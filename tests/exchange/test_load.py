import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ijepa_scale import build
from ijepa_scale.exchange.load import find, load, source_of
from ijepa_scale.models.vit import VIT_SIZES
from tests.exchange.test_reference import predictor_weights, reference_checkpoint, stripped
from tests.objectives.pixels import PixelObjective

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms"


def stored(checkpoint, kind, prefix):
    """A network's weights put together by hand from the files of all ranks."""
    pieces = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for key, values in load_file(file).items():
            of, name, start = key.split("|")
            if of == kind and name.startswith(prefix):
                pieces.setdefault(name.removeprefix(prefix), {})[int(start)] = values
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3", "stream"])
@pytest.mark.parametrize(
    "network, kind, prefix",
    [
        ("target", "ema", "context_encoder."),
        ("context", "master", "context_encoder."),
        ("predictor", "master", "predictor."),
    ],
)
def test_networks_of_runs_of_before_the_rooms(run, network, kind, prefix):
    checkpoint = OLD / run / "checkpoints" / "step-00000004"
    expected = stored(checkpoint, kind, prefix)
    for path in (OLD / run, checkpoint, OLD / run / "checkpoints"):
        loaded = load(path, network)
        assert (loaded.image_size, loaded.path, loaded.step, loaded.notes) == (16, checkpoint, 4, ())
        parameters = dict(loaded.network.named_parameters())
        assert parameters.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(parameters[name].flatten(), values)
        assert not any(parameter.requires_grad for parameter in parameters.values())
        assert not loaded.network.training


def test_the_target_encoder_is_another_than_the_context_encoder_and_runs():
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = [load(OLD / "zero1", network).network(images) for network in ("target", "context")]
    assert tokens[0].shape == (2, 16, 16) and (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_networks_of_a_file_of_the_reference(tmp_path, monkeypatch):
    from tests.exchange.test_reference import ENCODER, PREDICTOR

    monkeypatch.setitem(VIT_SIZES, "tiny", ENCODER)
    assert PREDICTOR.heads == ENCODER.heads
    path, content = tmp_path / "jepa-latest.pth.tar", reference_checkpoint()
    torch.save(content, path)
    digests = set()
    for network, part in (("target", "target_encoder"), ("context", "encoder"), ("predictor", "predictor")):
        loaded = load(path, network)
        assert (loaded.image_size, loaded.path, loaded.step) == (12, path, None)
        digests.add(loaded.sha256)
        assert load(path, network).sha256 == loaded.sha256
        for name, tensor in stripped(content[part]).items():
            assert torch.equal(loaded.network.state_dict()[name], tensor)
    assert len(digests) == 3


def test_the_newest_whole_checkpoint_of_a_run_and_why_others_are_skipped(tmp_path):
    shutil.copytree(OLD / "zero1", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000008")
    (checkpoints / "step-00000008" / "rank-00000.safetensors").write_bytes(b"")
    loaded = load(tmp_path / "run")
    assert loaded.path == checkpoints / "step-00000004" and len(loaded.notes) == 1
    assert "warning: skipped a checkpoint that is not whole" in loaded.notes[0] and "step-00000008" in loaded.notes[0]
    with pytest.raises(ValueError, match=r"step-00000008 cannot be used: rank-00000\.safetensors has 0 bytes"):
        load(checkpoints / "step-00000008")
    shutil.rmtree(checkpoints / "step-00000004")
    with pytest.raises(ValueError, match="checkpoints exist but none can be used"):
        load(tmp_path / "run")


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nowhere; give a run folder or one of its checkpoints, a"):
        load(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no run: there is no checkpoint in .*folder/checkpoints; give a run"):
        load(tmp_path / "folder")
    torch.save({"predictor": predictor_weights(0)}, tmp_path / "predictor.pth.tar")
    with pytest.raises(ValueError, match="has no weights under encoder, target_encoder, but holds predictor"):
        load(tmp_path / "predictor.pth.tar", "predictor")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match=r"config\.yaml is no whole file of torch\.save\(\)"):
        load(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="unknown network 'student'; choose one of target, context, predictor"):
        load(OLD / "zero1", "student")


def test_an_objective_without_a_target_has_its_encoder_alone(monkeypatch):
    monkeypatch.setitem(build.OBJECTIVES, "ijepa", lambda config: PixelObjective())
    assert find(OLD / "zero1").names == ("context",)
    with pytest.raises(ValueError, match=r"holds no predictor; it holds: context"):
        load(OLD / "zero1", "predictor")


def test_a_checkpoint_that_does_not_hold_the_network(tmp_path, monkeypatch):
    """Of an objective without a target, or of another size than its config says."""
    from ijepa_scale.exchange import run

    names = run.stored_names
    monkeypatch.setattr(run, "stored_names", lambda objective, network: (names(objective, network)[0], "none"))
    with pytest.raises(ValueError, match=r"step-00000004 cannot be loaded: the checkpoint holds 0 of the \d+ elements"):
        load(OLD / "zero1")
    manifest = {"step": 4, "config": None, "sha256": ""}
    known = "ijepa, data2vec, mae, cae"
    with pytest.raises(ValueError, match=f"cannot be loaded: it is of the objective pixels; known are: {known}"):
        run.read_network(run.Checkpoint(tmp_path, {**manifest, "config": {}, "objective": "pixels"}), "target")
    with pytest.raises(ValueError, match="says nothing of its config"):
        run.read_network(run.Checkpoint(tmp_path, manifest), "target")
    with pytest.raises(ValueError, match=r"cannot be loaded: .* keys that .* does not know: model\.widht"):
        run.read_network(run.Checkpoint(tmp_path, {**manifest, "config": {"model": {"widht": 3}}}), "target")


def test_what_reads_the_same_once_more(tmp_path, monkeypatch):
    """Of a run its checkpoint; of a file, and of a name whose weights lie in some cache, what was given."""
    loaded = load(OLD / "zero1")
    checkpoint = str(OLD / "zero1" / "checkpoints" / "step-00000004")
    assert source_of(OLD / "zero1", loaded) == source_of(checkpoint, loaded) == checkpoint
    file = tmp_path / "a.pth.tar"
    file.touch()
    monkeypatch.chdir(tmp_path)
    assert source_of("a.pth.tar", replace(loaded, path=file)) == str(file)
    assert source_of("timm:vit_x", replace(loaded, path=file)) == "timm:vit_x"
