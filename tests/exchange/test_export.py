"""The folder of an export, whatever its format; safetensors and ONNX. The verb itself is asked by the page's test."""

import hashlib
import json
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from ijepa_scale.evals.scores import Score, write_report
from ijepa_scale.exchange import export as exports
from ijepa_scale.exchange.export import export
from ijepa_scale.exchange.load import find, load
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer
from ijepa_scale.run.upkeep import convert
from ijepa_scale.verbs import export as verb
from launch.export import main
from tests.exchange.test_reference import ENCODER, reference_checkpoint

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("safetensors") / "exported"
    export(str(OLD / "zero3"), out, form="safetensors")
    return out


def same_bits(first, again):
    expected = first.network.state_dict()
    found = again.network.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_network_is_there_and_read_back_bit_for_bit(folder):
    manifest = json.loads((folder / "export.json").read_text())
    assert find(folder).names == ("target", "context", "predictor")
    for network in ("target", "context", "predictor"):
        first, again = load(OLD / "zero3", network), load(folder, network)
        assert same_bits(first, again) and again.network.size == first.network.size
        assert (again.name, again.step, again.image_size, again.config) == (network, 4, 16, first.config)
        said = manifest["networks"][network]
        assert said["sha256"] == again.sha256 == load(folder / f"{network}.safetensors", network).sha256
        assert (said["network"], said["image_size"], said["patch_size"]) == (network, 16, 4)
        assert said["size"] == {"width": 16, "depth": 2 - (network == "predictor"), "heads": 2, "mlp_width": 64}
        assert not again.network.training and not any(p.requires_grad for p in again.network.parameters())
    assert (manifest["format"], manifest["step"], manifest["config"]["seed"]) == ("safetensors", 4, 0)
    assert load(folder / "context.safetensors", "target").name == "context"
    with pytest.raises(ValueError, match="holds no target; it holds: predictor"):
        load(folder / "predictor.safetensors")


def test_a_password_in_an_older_manifest_goes_no_further(tmp_path):
    shutil.copytree(OLD / "zero3", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json"
    said = json.loads(path.read_text())
    said["config"]["data"]["source"] = "https://me:hunter2@host/images"
    del said["sha256"]
    sealed = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**said, "sha256": sealed}))
    for form in ("safetensors", "timm", "transformers"):
        export(str(tmp_path / "run"), tmp_path / form, form=form)
    convert(path.parent, tmp_path / "converted")
    written = [file for name in (*exports.FORMATS, "converted") for file in (tmp_path / name).rglob("*")]
    texts = [file.read_bytes() for file in written if file.is_file()]
    assert len(texts) > 10 and not [text for text in texts if b"hunter2" in text]
    assert sum(b"://[hidden]@host/images" in text for text in texts) >= 6


def test_no_more_than_one_network_is_in_memory(tmp_path, monkeypatch):
    made, written = weakref.WeakSet(), []
    for kind in (VisionTransformer, Predictor):

        def made_and_watched(self, *arguments, make=kind.__init__, **options):
            make(self, *arguments, **options)
            made.add(self)

        monkeypatch.setattr(kind, "__init__", made_and_watched)

    def write(loaded, folder):
        full = [network for network in made if any(not tensor.is_meta for tensor in network.parameters())]
        written.append(loaded.name)
        assert full == [loaded.network]

    monkeypatch.setitem(exports.FORMATS, "safetensors", write)
    export(str(OLD / "zero3"), tmp_path / "out", form="safetensors")
    assert written == ["target", "context", "predictor"]


def test_the_release_and_other_formats_are_exported_too(tmp_path, monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "tiny", ENCODER)
    path = tmp_path / "jepa-latest.pth.tar"
    torch.save(reference_checkpoint(), path)
    export(str(path), tmp_path / "first", form="safetensors")
    assert all(same_bits(load(path, name), load(tmp_path / "first", name)) for name in find(path).names)
    export(str(tmp_path / "first"), tmp_path / "second", form="transformers")
    export(str(tmp_path / "second"), tmp_path / "third", form="timm")
    assert same_bits(load(path), load(tmp_path / "third")) and load(tmp_path / "third").name == "target"


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for form, count in (("safetensors", 5), ("timm", 4), ("transformers", 5)):
        export(str(OLD / "zero1"), out, form=form)
        assert len(list(out.iterdir())) == count
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"--out .*out holds notes\.txt, which no export has written; give an empty"):
        export(str(OLD / "zero1"), out, form="timm")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        export(str(OLD / "zero1"), out / "notes.txt", form="timm")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("when", ["writing", "the second network"])
def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch, when):
    out = tmp_path / "out"
    export(str(OLD / "zero1"), out, form="safetensors", network="context")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls = []

    def fail(loaded, folder):
        calls.append(loaded.name)
        (folder / "half").write_bytes(b"half")
        if when == "writing" or len(calls) == 2:
            raise OSError("No space left on device")

    monkeypatch.setitem(exports.FORMATS, "safetensors", fail)
    for target in (out, tmp_path / "new"):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            export(str(OLD / "zero1"), target, form="safetensors")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_changed_files_of_an_export_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "context.safetensors").write_bytes((folder / "target.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not match its SHA-256 in export\.json"):
        load(tmp_path / "out", "context")
    (tmp_path / "out" / "target.safetensors").write_bytes((folder / "target.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load(tmp_path / "out")
    (tmp_path / "out" / "predictor.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tells of predictor\.safetensors, which is not there"):
        load(tmp_path / "out", "predictor")


def test_the_card_has_the_licence_the_data_the_config_and_the_scores(tmp_path):
    shutil.copytree(OLD / "zero1", tmp_path / "run")
    score = Score(probe="k-NN count", initial=20.0, trained=31.5, chance=12.5, num_test=100)
    report = tmp_path / "run" / "report.json"
    write_report(report, [score], step=4, checkpoint="step-00000004", held_out=True)
    export(str(tmp_path / "run"), tmp_path / "out", form="transformers", licence="apache-2.0")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["library_name"]) == ("apache-2.0", "transformers")
    assert "target encoder" in text and "on `images`, split `train`. Step 4." in text
    assert "| k-NN count | 31.5 ± 4.6 | 20.0 | 12.5 |" in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config == json.loads(json.dumps(load(OLD / "zero1").config))
    export(str(tmp_path / "run"), tmp_path / "out", form="timm", network="context")
    assert "Scores" not in (tmp_path / "out" / "README.md").read_text()  # which are the target encoder's
    export(str(tmp_path / "run"), tmp_path / "alone", form="safetensors", network="predictor")
    assert 'load("FOLDER", "predictor")' in (tmp_path / "alone" / "README.md").read_text()
    write_report(report, [score], step=8, checkpoint="step-00000008", held_out=True)  # of other weights
    export(str(tmp_path / "run"), tmp_path / "out", form="timm")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Scores" not in text and "licence: unknown; whoever shares these weights states it" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--format", "transformers", "--network", "predictor"], "no class for the predictor; .* --format safetensors"),
        (["--format", "onnx", "--network", "predictor"], "onnx has no class for the predictor"),
    ],
)
def test_the_predictor_has_no_class_elsewhere(tmp_path, capsys, words, message):
    assert main([str(OLD / "zero1"), *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and not (tmp_path / "out").exists()


def test_what_onnx_needs_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    for package in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([str(OLD / "zero1"), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "onnxscript, onnxruntime not installed; get it with: pip install 'ijepa-scale[export]'" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="is an ONNX graph, which is written and not read"):
        load(tmp_path / "model.onnx")


@pytest.mark.slow  # the exporter and its packages take ten seconds
@pytest.mark.parametrize("files", [1, 2])
def test_an_onnx_graph_gives_both_features_for_any_batch(tmp_path, monkeypatch, files):
    """Of large networks the weights are in a file of their own."""
    import onnxruntime

    from ijepa_scale.exchange import onnx

    if files == 2:
        monkeypatch.setattr(onnx, "INSIDE_BYTES", 0)
    export(str(OLD / "zero3"), tmp_path / "out", form="onnx", network="context")
    assert len(list((tmp_path / "out").glob("model.onnx*"))) == files
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    run = load(OLD / "zero3", "context").network
    for batch in (1, 5):
        images = torch.randint(256, (batch, 3, 16, 16), dtype=torch.uint8)
        patches, pooled = session.run(["patch_features", "pooled_features"], {"images": images.numpy()})
        with torch.no_grad():
            expected = run(images)
        torch.testing.assert_close(torch.from_numpy(patches), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(pooled), expected.mean(1), rtol=0, atol=1e-5)
    said = session.get_modelmeta().custom_metadata_map
    assert said["images"].startswith("uint8 RGB") and json.loads(said["ijepa_scale"])["network"] == "context"


@pytest.mark.slow  # as above
def test_a_graph_that_is_not_the_encoder_is_refused(tmp_path, monkeypatch):
    from ijepa_scale.exchange import onnx

    plain = onnx.PlainEncoder.forward
    monkeypatch.setattr(onnx.PlainEncoder, "forward", lambda self, images: [t * 1.01 for t in plain(self, images)])
    with pytest.raises(ValueError, match=r"onnxruntime's patch_features of 1 images differ by .* from the encoder's"):
        export(str(OLD / "zero3"), tmp_path / "out", form="onnx")
    assert not (tmp_path / "out").exists()


def test_the_verb_offers_the_formats_that_there_are():
    assert sorted(verb.FORMATS) == sorted(verb.NEXT) == sorted(exports.FORMATS)


def test_the_header_holds_what_the_folder_says(folder):
    with safe_open(folder / "target.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["ijepa_scale"])["size"]["heads"] == 2
