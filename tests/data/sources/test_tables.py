import csv
import logging
import random

import datasets
import pytest

from ijepa_scale.data.images import open_images, splits_of
from ijepa_scale.data.sources import tables
from ijepa_scale.data.sources.inspection import is_mapped
from ijepa_scale.data.sources.tables import listed_images
from tests.data.small_sources import WHOLE, number_of, write_images, write_jsonl


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "pictures", range(6))
    return tmp_path


def numbers(images):
    return [number_of(images.read(i)) for i in range(len(images))]


def test_a_csv(folder):
    rows = ["id,where,label", "7,pictures/0004.png,dog", "8,pictures/0001.png,cat", "9,pictures/0002.png,"]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    images = open_images(str(folder / "list.csv"))
    assert numbers(images) == [4, 1, 2]
    assert images.sample_id(0) == str(folder / "pictures/0004.png")
    column = images.label_columns()["label"]
    assert column.names == ["cat", "dog"] and column.values.tolist() == [1, 0, -1]


def test_a_tsv_and_json_lines(folder):
    (folder / "list.tsv").write_text(f"file_name\n{folder}/pictures/0003.png\n")
    assert numbers(open_images(str(folder / "list.tsv"))) == [3]
    rows = [{"image": f"pictures/{i:04}.png", "class": i % 2, "x": [i]} for i in (5, 0)]
    images = open_images(str(write_jsonl(folder / "list.jsonl", [*rows, {"image": "pictures/0001.png"}])))
    assert numbers(images) == [5, 0, 1]
    assert images.label_columns()["label"].values.tolist() == [1, 0, -1]
    assert is_mapped(str(folder / "list.tsv"))


def test_columns_are_found_by_name_first_and_by_what_is_there(folder):
    """`path` holds names of elsewhere; both `image` and `also` hold files."""
    rows = [{"path": f"/away/{i}.png", "also": "pictures/0000.png", "image": f"pictures/{i:04}.png"} for i in range(3)]
    assert numbers(open_images(str(write_jsonl(folder / "a.jsonl", rows)))) == [0, 1, 2]
    rows = [{"path": f"/away/{i}.png", "also": f"pictures/{i:04}.png"} for i in range(3)]
    assert numbers(open_images(str(write_jsonl(folder / "b.jsonl", rows)))) == [0, 1, 2]


@pytest.mark.parametrize(
    "header, row, taken",
    [
        ("source_url,photo", "https://host/a.jpg,pictures/0001.png", "photo"),  # what is here comes first
        ("page,url", "https://host/page,https://host/x?id=1", "url"),
        ("page,picture", "https://host/page,https://host/a.JPG?size=1", "picture"),
        ("page,thumb", "https://host/page,none", "page"),
    ],
)
def test_of_several_columns_files_come_first_then_urls_of_images(folder, caplog, header, row, taken):
    caplog.set_level(logging.INFO)
    (folder / "a.csv").write_text(f"{header}\n{row}\n")
    value = dict(zip(header.split(","), row.split(","), strict=True))[taken]
    expected = value if "://" in value else str(folder / value)
    assert listed_images(str(folder / "a.csv")).paths == [expected]
    assert f"a.csv: the images are those of its column {taken!r}" in caplog.text


def test_a_table_in_another_encoding_or_without_a_header_is_refused(folder):
    (folder / "a.csv").write_bytes("path,label\npictures/0001.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"the column 'label' of .*a\.csv is not UTF-8 text; save"):
        open_images(str(folder / "a.csv"))
    for line in ("pictures/0001.png,a", "https://host/1,a"):
        (folder / "a.csv").write_text(f"{line}\npictures/0002.png,b\n")
        with pytest.raises(ValueError, match=rf"a\.csv begins with an image, '{line[:-2]}', where the names of col"):
            open_images(str(folder / "a.csv"))


def test_missing_files_are_bad_images_and_nothing_but_missing_files_is_an_error(folder):
    rows = [{"path": f"pictures/{i:04}.png"} for i in (9, 1, 8)]
    images = open_images(str(write_jsonl(folder / "a.jsonl", rows)))
    image, bad = images.crop_or_substitute(0, WHOLE)
    assert number_of(image) == 1 and "No such file" in bad[0].reason
    rows = [{"path": f"photos/{i:04}.png", "text": "x"} for i in range(3)]
    source = write_jsonl(folder / "b.jsonl", rows)
    with pytest.raises(
        ValueError, match=rf"no column of {source}.*'path' would be '{folder}/photos/0000\.png'.*path, text"
    ):
        open_images(str(source))
    (folder / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="there are none; its columns are: a, b"):
        open_images(str(folder / "c.csv"))
    (folder / "d.csv").write_text("")
    with pytest.raises(ValueError, match=r"d\.csv cannot be read as a table"):
        open_images(str(folder / "d.csv"))


def test_one_file_among_many_missing_is_found(folder):
    rows = [{"path": f"pictures/{i:04}.png"} for i in range(100, 300)] + [{"path": "pictures/0001.png"}]
    assert len(open_images(str(write_jsonl(folder / "a.jsonl", rows)))) == 201


def test_a_folder_with_a_table_for_each_split(folder):
    (folder / "train.csv").write_text("path,label\npictures/0001.png,b\npictures/0002.png,a\n")
    (folder / "val.csv").write_text("path,label\npictures/0003.png,b\n")
    assert sorted(splits_of(str(folder))) == ["train", "validation"]
    assert numbers(open_images(str(folder))) == [1, 2]
    val = open_images(str(folder), split="val")
    assert numbers(val) == [3]
    assert val.label_columns()["label"].names == ["a", "b"] and val.label_columns()["label"].values.tolist() == [1]


def test_a_table_that_lists_no_images_leaves_a_folder_of_images_as_it_is(folder):
    (folder / "notes.csv").write_text("name,price\nx,1\n")
    assert numbers(open_images(str(folder))) == [0, 1, 2, 3, 4, 5]
    (folder / "notes.csv").write_text("name,file\nx,pictures/0004.png\n")
    assert numbers(open_images(str(folder))) == [4]
    (folder / "more.csv").write_text("name,file\nx,pictures/0004.png\n")  # which of the two?
    assert numbers(open_images(str(folder))) == [0, 1, 2, 3, 4, 5]


def test_images_that_a_folders_table_does_not_list_are_told(folder, caplog):
    (folder / "labels.csv").write_text("file,label\npictures/0004.png,a\npictures/0001.png,b\n")
    for _ in range(2):
        assert numbers(open_images(str(folder))) == [4, 1]
    assert caplog.text.count(f"labels.csv in {folder} lists 2 images, and 6 lie there: only those listed are read") == 1
    caplog.clear()
    rows = "".join(f"pictures/{i:04}.png,a\n" for i in range(6))
    (folder / "labels.csv").write_text(f"file,label\n{rows}")
    assert len(open_images(str(folder))) == 6 and not caplog.records


def test_tables_alone_in_a_folder(tmp_path, folder):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "a.csv").write_text("path\n../pictures/0001.png\n")
    assert numbers(open_images(str(alone))) == [1]
    (alone / "b.csv").write_text("path\n../pictures/0001.png\n")
    with pytest.raises(ValueError, match=r"several tables for one split: a\.csv, b\.csv; give one"):
        open_images(str(alone))
    (alone / "b.csv").unlink()
    (alone / "a.csv").write_text("path\nhttp://localhost/1.png\n")
    assert not is_mapped(str(alone))
    with pytest.raises(
        ValueError, match=r"the table lists URLs.*for training set data.streaming=true; for anything else give a f"
    ):
        open_images(str(alone))


def test_nothing_is_copied(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_images(str(write_jsonl(folder / "a.jsonl", [{"path": "pictures/0001.png"}])))
    assert not (tmp_path / "cache").exists()


CAPTIONS = ["plain", '"begins', 'ends"', '"both"', 'say "hi"', '"', '""', '"a" and "b"', "it's", "", "née", '5" x 7"']


def written(rows, writer, rng):
    """(ending, text) of a table as one of the usual writers leaves it."""
    if writer == "joined":
        return "tsv", "".join("\t".join(row) + "\n" for row in rows)
    dialect, quoting = {
        "csv": ("excel", csv.QUOTE_MINIMAL),
        "csv, all quoted": ("excel", csv.QUOTE_ALL),
        "tsv": ("excel-tab", csv.QUOTE_MINIMAL),
        "tsv, all quoted": ("excel-tab", csv.QUOTE_ALL),
    }[writer]
    lines = []
    end = rng.choice(["\n", "\r\n"])
    out = csv.writer(type("File", (), {"write": lines.append}), dialect, quoting=quoting, lineterminator=end)
    out.writerows(rows)
    return dialect.replace("excel-tab", "tsv").replace("excel", "csv"), "".join(lines)


@pytest.mark.parametrize("writer", ["joined", "csv", "csv, all quoted", "tsv", "tsv, all quoted"])
def test_every_row_is_read_whoever_wrote_the_table(folder, writer, monkeypatch):
    """Quotes that begin fields and quotes around them; quoted newlines, delimiters; more than pyarrow takes at once."""
    monkeypatch.setattr(tables, "_BLOCK", 1 << 14, raising=False)
    rng = random.Random(writer)
    spread = [] if writer == "joined" else ["two\nlines", 'a,\n"b"\n\nc', "\n", "tab\there"]
    for number in range(30):
        count = rng.randrange(1, 40) if number else 25_000 if writer == "csv" else 2000
        paths = [f"pictures/{rng.randrange(6):04}.png" for _ in range(count)]
        labels = [rng.choice(["cat", 'a "big" dog', "x" * 30]) for _ in range(count)]
        rows = [[path, rng.choice(CAPTIONS + spread), label] for path, label in zip(paths, labels, strict=True)]
        order = rng.sample(range(3), 3)
        rows = [[row[i] for i in order] for row in [["path", "caption", "label"], *rows]]
        ending, text = written(rows, writer, rng)
        file = folder / f"{number}.{ending}"
        file.write_text(text + rng.choice(["", "\n", "\r\n\r\n"]), encoding="utf-8", newline="")
        found = listed_images(str(file))
        assert found.paths == [str(folder / path) for path in paths], text
        assert found.labels == labels


def test_rows_that_are_not_whole_are_named_and_lost_ones_told(folder, caplog):
    rows = [f'pictures/{i % 6:04}.png,{i},"a, {i}"' for i in range(20)]
    for name, text, line in (
        ("a.csv", "\n".join([*rows[:7], "pictures/0001.png,1,x,y", *rows[7:]]), 9),
        ("b.csv", "\n".join([*rows[:7], "pictures/0001.png,1", *rows[7:]]), 9),
        ("c.csv", "\n".join(['pictures/0001.png,1,"two\nlines"', *rows[:7], "pictures/0001.png,1"]), 11),
        ("d.tsv", "\n".join(["p\t1\t2", 'p\t"q\t2', "p\t1"]), 4),
    ):
        header = "path\tlabel\tcaption\n" if name.endswith("tsv") else "path,label,caption\n"
        (folder / name).write_text(header + text)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a table: line {line} has \d fields"):
            listed_images(str(folder / name))
    for row, words in (('{"path": 1', "is no JSON"), ("[1]", "is no object with the names")):
        (folder / "g.jsonl").write_text(f'{{"path": "pictures/0001.png"}}\n\n{row}\n')
        with pytest.raises(ValueError, match=rf"g\.jsonl cannot be read as a table: line 3 {words}"):
            listed_images(str(folder / "g.jsonl"))
    unclosed = [row if i != 7 else 'pictures/0001.png,1,"a' for i, row in enumerate(rows)]
    (folder / "e.csv").write_text("path,label,caption\n" + "\n".join(unclosed))
    with pytest.raises(ValueError, match=r"a quote by the end of line 10 has none that closes its field"):
        listed_images(str(folder / "e.csv"))
    (folder / "f.csv").write_text('path,caption\npictures/0001.png,"a, b"\npictures/0002.png,"c\n')
    assert len(listed_images(str(folder / "f.csv")).paths) == 2
    assert "f.csv: a quote by the end of line 3 has none" in caplog.text and "may have become one" in caplog.text


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("nothing", ["", None, "NaN", "nan", "null", " ", float("nan")])
def test_an_empty_cell_is_no_class(folder, ending, nothing):
    """Of names and of numbers, also where the numbers are floats as pandas writes those of a column with gaps."""
    for values, names in (["dog", "cat"], ["cat", "dog"]), (["2", "0"], None), (["2.0", "0.0"], None):
        cells = [values[0], nothing, values[1], nothing]
        if ending == "csv":
            rows = "".join(f"pictures/0001.png,{'' if cell is None else cell}\n" for cell in cells)
            file = folder / "a.csv"
            file.write_text(f"path,label\n{rows}")
        else:
            cells = [cell if names or cell == nothing else float(cell) for cell in cells]
            if not names and nothing is not None:
                continue  # JSON tells numbers and text apart
            file = write_jsonl(folder / "a.jsonl", [{"path": "pictures/0001.png", "label": cell} for cell in cells])
        column = open_images(str(file)).label_columns()["label"]
        assert column.names == (names or ["0", "1", "2"])
        assert column.values.tolist() == ([1, -1, 0, -1] if names else [2, -1, 0, -1])


@pytest.mark.parametrize("odd", [False, True])
def test_true_and_false_are_classes_as_a_csv_has_them(folder, odd):
    """odd: of a file whose columns are of several types."""
    rows = [{"path": "pictures/0001.png", "label": label, "x": 1} for label in (True, False, None, True)]
    rows[0]["x"] = "one" if odd else 1
    column = open_images(str(write_jsonl(folder / "a.jsonl", rows))).label_columns()["label"]
    assert (column.names, column.values.tolist()) == (["False", "True"], [1, 0, -1, 1])


def test_labels_that_are_none_are_told(folder, caplog):
    for number, label in enumerate((0.5, "2024-01-02", [1], 2)):
        rows = [{"path": "pictures/0001.png", "label": label, "category": "a"}]
        found = listed_images(str(write_jsonl(folder / f"{number}.jsonl", rows)))
        assert found.labels == ([2] if number == 3 else ["a"])
        assert (f"{number}.jsonl: its column 'label' is not taken for labels" in caplog.text) == (number < 3)


def test_names_of_columns(folder, caplog):
    """In capitals; the photograph rather than what is made of it; twice; by `column`."""
    row = "pictures/0001.png,pictures/0002.png,3"

    def paths(header, column=""):
        (folder / "a.csv").write_text(f"{header}\n{row}\n{row}\n")
        found = listed_images(str(folder / "a.csv"), column)
        return [int(path[-8:-4]) for path in found.paths], found.labels

    assert paths("Path,Other,Label") == ([1, 1], [3, 3])
    assert paths("OTHER, Image_Path, CLASS") == ([2, 2], [3, 3])
    for mask in ("mask", "segMap", "depth_path", "conditioning_image", "annotations"):
        for photo in ("photo", "image", "Picture_Path", "left"):
            caplog.clear()
            assert paths(f"{mask},{photo},label") == ([2, 2], [3, 3])
            assert f"several columns of images ({photo}, {mask}); reading '{photo}'; data.column" in caplog.text
            caplog.clear()
            assert paths(f"{photo},{mask},label", mask) == ([2, 2], [3, 3])
            assert not caplog.records
    assert paths("x,path,x")[0] == [2, 2]
    for header, name in (("path,path,label", "path"), ("path,label,label", "label")):
        with pytest.raises(ValueError, match=rf"a\.csv has several columns called '{name}'; give each a name"):
            paths(header)
    with pytest.raises(ValueError, match=r"a\.csv has no column 'photo'; its columns are: path, mask, label"):
        paths("path,mask,label", "photo")
