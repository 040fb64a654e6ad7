import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ijepa_scale.embed import embed, load_run, neighbours
from tests.end_to_end.runs import Runs


@pytest.fixture(scope="module")
def run(small_config, tmp_path_factory):
    """A run folder with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("embed")
    Runs(small_config, folder / "output")(folder / "run", "optimization.stop_at_step=8", ranks=1)
    return folder / "run"


@pytest.fixture(scope="module")
def embedded(run, image_folder, tmp_path_factory):
    """The pictures, one of which is broken, and the folder of their embeddings, made in batches of 7."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copytree(image_folder / "train", folder / "pictures")
    (folder / "pictures" / "class-1" / "005.png").write_bytes(b"no image")
    embed(str(run), str(folder / "pictures"), str(folder / "out"), batch_size=7, workers=0)
    return folder


def rows_of(folder):
    with open(folder / "images.csv", newline="") as file:
        return list(csv.DictReader(file))


def by_hand(run, path):
    """One image through a plain encoder that holds the averaged weights of the newest checkpoint."""
    encoder, _, _ = load_run(run)
    pieces = load_file(run / "checkpoints" / "step-00000008" / "rank-00000.safetensors")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(pieces[f"ema|context_encoder.{name}|0"].view(parameter.shape))
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = 37 / min(width, height)  # 32 * 256 / 224
    wide, high = max(37, int(width * scale)), max(37, int(height * scale))
    left, top = round((wide - 32) / 2), round((high - 32) / 2)
    box = (left * width / wide, top * height / high, (left + 32) * width / wide, (top + 32) * height / high)
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels.copy())[None])[0].mean(dim=0).numpy()


def test_a_row_is_the_mean_of_the_averaged_encoders_tokens(run, embedded):
    features, rows = np.load(embedded / "out" / "embeddings.npy"), rows_of(embedded / "out")
    assert features.shape == (63, 32) and features.dtype == np.float32 and len(rows) == 63
    for row in (0, 17, 62):
        np.testing.assert_allclose(features[row], by_hand(run, rows[row]["image"]), rtol=1e-5, atol=1e-5)
    assert np.abs(features[0] - features[17]).max() > 1e-3  # what the tolerance is to be compared with


def test_every_readable_image_has_its_row_and_the_others_are_named(embedded):
    rows = rows_of(embedded / "out")
    files = sorted((embedded / "pictures").rglob("*.png"))
    assert [row["image"] for row in rows] == [str(file) for file in files if file.name != "005.png"]
    assert [int(row["index"]) for row in rows] == [i for i, file in enumerate(files) if file.name != "005.png"]
    assert all(row["label"] in row["image"] for row in rows)
    facts = json.loads((embedded / "out" / "embeddings.json").read_text())
    assert [path.endswith("class-1/005.png") for path in facts["unreadable"]] == [True] and facts["step"] == 8
    assert sorted(path.name for path in (embedded / "out").iterdir()) == [
        "embeddings.json",
        "embeddings.npy",
        "images.csv",
    ]


def test_neighbours_are_those_of_the_definition(embedded, capsys, tmp_path):
    rows = rows_of(embedded / "out")
    query = rows[20]["image"]
    copy = tmp_path / "elsewhere.png"
    shutil.copy(query, copy)
    capsys.readouterr()
    neighbours(str(embedded / "out"), [query, str(copy)], str(tmp_path / "picture.png"), count=5)
    first, second = capsys.readouterr().out.split(f"{copy}:\n")
    features = np.load(embedded / "out" / "embeddings.npy").astype(np.float64)
    centred = features - features.mean(axis=0)
    cosine = [float(a @ centred[20] / np.linalg.norm(a) / np.linalg.norm(centred[20])) for a in centred]
    order = sorted(range(63), key=lambda row: -cosine[row])
    listed = [line.split() for line in first.splitlines()[1:]]
    assert order[0] == 20  # the query itself is not its own neighbour
    assert [path for _, path in listed] == [rows[row]["image"] for row in order[1:6]]
    assert [float(value) for value, _ in listed] == pytest.approx([cosine[row] for row in order[1:6]], abs=1e-3)
    assert second.split()[:2] == ["1.000", query]  # a copy from elsewhere finds it
    assert Image.open(tmp_path / "picture.png").size > (600, 300)


def test_without_a_query_some_of_the_images_are_shown(embedded, capsys, tmp_path):
    neighbours(str(embedded / "out"), [], str(tmp_path / "picture.png"), count=3)
    out = capsys.readouterr().out
    assert out.count(":\n") == 6 and out.count("  0.") + out.count("  1.") + out.count("  -") == 18


def test_what_a_user_gets_wrong_is_named(run, embedded, tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=r"make them with launch/embed\.py"):
        neighbours(str(tmp_path), [], str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"cannot read the query .*broken\.jpg"):
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        neighbours(str(embedded / "out"), [str(tmp_path / "broken.jpg")], str(tmp_path / "a.png"))
    bad = tmp_path / "all-bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        embed(str(run), str(bad), str(tmp_path / "out"), workers=0)
    assert list((tmp_path / "out").iterdir()) == []
    damaged = tmp_path / "run"
    shutil.copytree(run / "checkpoints" / "step-00000004", damaged / "checkpoints" / "step-00000004")
    file = damaged / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="step-00000004"):
        load_run(damaged)


@pytest.mark.parametrize("change", ["one more", "some fewer"])
def test_a_source_that_has_changed_is_refused(embedded, tmp_path, change):
    """Row i of the embeddings would be shown with another picture, or with none."""
    shutil.copytree(embedded, tmp_path / "all")
    pictures, out = tmp_path / "all" / "pictures", tmp_path / "all" / "out"
    for name in ("images.csv", "embeddings.json"):
        (out / name).write_text((out / name).read_text().replace(str(embedded), str(tmp_path / "all")))
    query = rows_of(out)[40]["image"]
    neighbours(str(out), [query], str(tmp_path / "before.png"), count=3)
    if change == "one more":
        shutil.copy(query, pictures / "class-0" / "0.png")
    else:
        for path in sorted(pictures.rglob("*.png"))[4:]:
            path.unlink()
    for queries in ([], [query] if change == "one more" else []):
        with pytest.raises(ValueError, match=r"has changed since it was embedded: .*run launch/embed\.py again"):
            neighbours(str(out), queries, str(tmp_path / "after.png"), count=3)
    assert not (tmp_path / "after.png").exists()


def test_a_damaged_checkpoint_is_skipped_aloud(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000008" / "rank-00000.safetensors").write_bytes(b"")
    assert load_run(tmp_path)[2].step == 4
    assert "warning: skipped a checkpoint that is not whole" in capsys.readouterr().out


def test_a_query_wants_the_checkpoint_that_made_the_embeddings(run, embedded, tmp_path):
    """Of a run that trained on, or was trained again. The embeddings' own images need none."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(embedded / "out", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    newest, older = (tmp_path / "run" / "checkpoints" / name for name in ("step-00000008", "step-00000004"))
    (tmp_path / "out" / "embeddings.json").write_text(json.dumps({**facts, "checkpoint": str(newest)}))
    query = rows_of(tmp_path / "out")[3]["image"]
    neighbours(str(tmp_path / "out"), [query], str(tmp_path / "a.png"), count=2)
    shutil.rmtree(newest)
    for what in ("is no longer there", "has been replaced by another one"):
        with pytest.raises(ValueError, match=rf"step-00000008, {what}.*launch/embed\.py {facts['run']}, or leave out"):
            neighbours(str(tmp_path / "out"), [query], str(tmp_path / "a.png"), count=2)
        neighbours(str(tmp_path / "out"), [], str(tmp_path / "a.png"), count=2)
        if not newest.exists():
            older.rename(newest)
    del facts["checkpoint_sha256"]  # as earlier versions wrote it
    (tmp_path / "out" / "embeddings.json").write_text(json.dumps({**facts, "checkpoint": str(newest)}))
    neighbours(str(tmp_path / "out"), [query], str(tmp_path / "a.png"), count=2)
