import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ijepa_scale.exchange.load import load
from ijepa_scale.models.vit import VIT_SIZES
from ijepa_scale.verbs.embed import embed_source as embed
from ijepa_scale.verbs.neighbours import show_neighbours as neighbours
from launch.neighbours import main
from tests.data.small_sources import IMAGE, encoded, write_parquet
from tests.data.test_images import one_bit
from tests.end_to_end.runs import Runs
from tests.exchange.test_reference import ENCODER, reference_checkpoint


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
    encoder = load(run).network
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


def test_another_column_of_a_configuration_is_embedded_and_shown(run, tmp_path, capsys):
    """And by the neighbours too, also of embeddings that say nothing of either."""
    masks = [{"bytes": encoded(40 * i), "path": f"mask-{i}.png"} for i in range(3)]
    source = tmp_path / "set"
    write_parquet(source / "a/train.parquet", range(3), mask=pa.array(masks, IMAGE))
    (source / "README.md").write_text("---\nconfigs:\n- {config_name: a, data_files: a/*}\n- {config_name: b}\n---\n")
    options = {"workers": 0, "cache_dir": str(tmp_path / "cache")}
    embed(str(run), str(source), str(tmp_path / "out"), column="mask", config="a", **options)
    assert [row["image"] for row in rows_of(tmp_path / "out")] == ["mask-0.png", "mask-1.png", "mask-2.png"]
    neighbours(str(tmp_path / "out"), [], str(tmp_path / "picture.png"), count=2)
    embed(str(run), str(source / "a"), str(tmp_path / "old"), **options)
    facts = json.loads((tmp_path / "old/embeddings.json").read_text())
    del facts["column"], facts["config"]
    (tmp_path / "old/embeddings.json").write_text(json.dumps(facts))
    neighbours(str(tmp_path / "old"), [], str(tmp_path / "picture.png"), count=2)
    assert "mask-1.png" in capsys.readouterr().out


def test_a_file_is_no_neighbour_of_itself_by_whatever_path(run, image_folder, tmp_path, capsys, monkeypatch):
    """A copy is. Names are drawn as they are, though they look like formulas."""
    pictures, out = tmp_path / "pictures", str(tmp_path / "out")
    pictures.mkdir()
    for name, source in (("$1_$2.png", "000"), ("copy.png", "000"), ("b.png", "001"), ("[red]c$.png", "002")):
        shutil.copy(next(image_folder.rglob(f"{source}.png")), pictures / name)
    (pictures / "link.png").symlink_to(pictures / "$1_$2.png")
    (pictures / "hard.png").hardlink_to(pictures / "$1_$2.png")
    (tmp_path / "also").symlink_to(pictures)
    embed(str(run), str(pictures), out, workers=0)
    monkeypatch.chdir(tmp_path)
    same = ["$1_$2.png", "link.png", "hard.png"]
    queries = (
        [f"also/{name}" for name in same] + [str(pictures / name) for name in same] + ["pictures/../also/hard.png"]
    )
    for asked in (queries, []):
        capsys.readouterr()
        neighbours(out, asked, str(tmp_path / "picture.png"), count=5)
        printed = capsys.readouterr().out.split("picture: ")[0]
        found = {}
        for line in printed.splitlines():
            if line.startswith("  "):
                found[name].append(line.split()[1].rpartition("/")[2])
            else:
                name = line.removesuffix(":")
                found[name] = []
        assert len(found) == (len(queries) if asked else 6)
        for name, listed in found.items():
            if name.rpartition("/")[2] in same:
                assert listed[0] == "copy.png" and sorted(listed) == ["[red]c$.png", "b.png", "copy.png"]
            else:
                assert len(listed) == 5 and set(same) <= set(listed)


def test_a_query_that_cannot_be_read_is_one_line(embedded, tmp_path, capsys):
    huge = one_bit(30_000, 20_000)
    broken = {
        "no.jpg": b"no image",
        "huge.png": huge,
        "cut.png": huge[:60],
        "none.png": b"",
        "bad.png": huge[:29] + b"bad!",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for name in (*broken, "missing.png", "."):
        assert main([str(embedded / "out"), "--query", str(tmp_path / name), "--out", str(tmp_path / "a.png")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: cannot read the query ") and error.count("\n") == 1 and len(error) > 60
    assert not (tmp_path / "a.png").exists()


def test_what_a_user_gets_wrong_is_named(run, embedded, tmp_path):
    with pytest.raises(ValueError, match=r"make them with ijepa-scale embed"):
        neighbours(str(tmp_path), [], str(tmp_path / "a.png"), count=3)
    with pytest.raises(ValueError, match=r"cannot read the query .*broken\.jpg"):
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        neighbours(str(embedded / "out"), [str(tmp_path / "broken.jpg")], str(tmp_path / "a.png"), count=3)
    bad = tmp_path / "all-bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        embed(str(run), str(bad), str(tmp_path / "out"), workers=0)
    assert list((tmp_path / "out").iterdir()) == []


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
        with pytest.raises(ValueError, match=r"has changed since it was embedded: .*run ijepa-scale embed again"):
            neighbours(str(out), queries, str(tmp_path / "after.png"), count=3)
    assert not (tmp_path / "after.png").exists()


def test_a_damaged_checkpoint_is_skipped_aloud(run, image_folder, tmp_path, capsys):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000008" / "rank-00000.safetensors").write_bytes(b"")
    embed(str(tmp_path), str(image_folder), str(tmp_path / "out"), workers=0)
    assert json.loads((tmp_path / "out" / "embeddings.json").read_text())["step"] == 4
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
        with pytest.raises(ValueError, match=rf"step-00000008, {what}.*ijepa-scale embed {facts['run']}, or leave out"):
            neighbours(str(tmp_path / "out"), [query], str(tmp_path / "a.png"), count=2)
        neighbours(str(tmp_path / "out"), [], str(tmp_path / "a.png"), count=2)
        if not newest.exists():
            older.rename(newest)
    del facts["checkpoint_sha256"]  # as earlier versions wrote it
    (tmp_path / "out" / "embeddings.json").write_text(json.dumps({**facts, "checkpoint": str(newest)}))
    neighbours(str(tmp_path / "out"), [query], str(tmp_path / "a.png"), count=2)


def test_a_file_of_the_reference_embeds_too(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(VIT_SIZES, "tiny", ENCODER)
    path, out = tmp_path / "jepa-latest.pth.tar", tmp_path / "out"
    torch.save(reference_checkpoint(), path)
    embed(str(path), str(image_folder), str(out), workers=0)
    facts = json.loads((out / "embeddings.json").read_text())
    assert facts["checkpoint"] == str(path) and facts["step"] is None and facts["image_size"] == 12
    query = rows_of(out)[3]["image"]
    neighbours(str(out), [query], str(tmp_path / "a.png"), count=2)
    other = reference_checkpoint()
    other["target_encoder"]["module.norm.bias"] += 1
    torch.save(other, path)
    with pytest.raises(ValueError, match="has been replaced by another one"):
        neighbours(str(out), [query], str(tmp_path / "a.png"), count=2)
