import gzip
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ijepa_scale.data.sources.remote import Patience, StreamError
from ijepa_scale.data.sources.shards import DAMAGED, shard_kind
from ijepa_scale.data.streams.reading import read_shard
from tests.data.server import serving
from tests.data.small_sources import encoded, write_images, write_parquet, write_tar

PATIENCE = Patience(0.1, 0.01)
COUNT = 11


def write_arrow(path, file_format):
    table = pq.read_table(write_parquet(path.with_suffix(".parquet"), range(COUNT)))
    writer = (pa.ipc.new_stream if file_format == "stream" else pa.ipc.new_file)(str(path), table.schema)
    with writer:
        writer.write_table(table, max_chunksize=3)
    return path


def write_binary(path):
    table = pa.table({"image": pa.array([encoded(i) for i in range(COUNT)], pa.binary())})
    pq.write_table(table, path, row_group_size=4)
    return path


MAKERS = {
    "parquet": lambda root: write_parquet(root / "x.parquet", range(COUNT)),
    "one row group": lambda root: write_parquet(root / "y.parquet", range(COUNT), group=100),
    "binary": lambda root: write_binary(root / "z.PARQUET"),
    "arrow stream": lambda root: write_arrow(root / "s.arrow", "stream"),
    "arrow file": lambda root: write_arrow(root / "f.arrow", "file"),
    "tar": lambda root: write_tar(root / "x.tar", range(COUNT)),
    "tar.gz": lambda root: write_tar(root / "x.tar.gz", range(COUNT), "w:gz"),
}


def read(location, **options):
    column = "" if shard_kind(str(location)) == "tar" else "image"
    rows = read_shard(str(location), **{"column": column, "patience": PATIENCE, **options})
    return [(position, image) for position, image in rows]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("where", ["here", "server", "server without ranges"])
def test_reading_goes_on_from_any_row(tmp_path, kind, where):
    location = path = MAKERS[kind](tmp_path)
    with serving(tmp_path) as server:
        server.ranges = where == "server"
        if where != "here":
            location = f"{server.url}/{path.name}"
        rows = read(location)
        assert [image.content for _, image in rows] == [encoded(i) for i in range(COUNT)]
        assert [image.index for _, image in rows] == list(range(COUNT))
        assert [position[0] for position, _ in rows] == list(range(1, COUNT + 1))
        for i, (position, _) in enumerate(rows):
            assert read(location, start=position) == rows[i + 1 :]
        shares = [read(location, share=(r, 3), start=rows[1][0]) for r in range(3)]
        assert [[image is not None for _, image in share] for share in shares] == [
            [i % 3 == r for i in range(2, COUNT)] for r in range(3)
        ]
        assert [position for position, _ in shares[0]] == [position for position, _ in rows[2:]]


def test_a_tar_goes_on_where_it_was_without_reading_what_came_before(tmp_path):
    write_tar(tmp_path / "x.tar", range(400))
    with serving(tmp_path) as server:
        positions = [position for position, _ in read(f"{server.url}/x.tar")]
        server.requests.clear()
        assert len(read(f"{server.url}/x.tar", start=positions[-3])) == 2
        assert [wanted for _, wanted, _ in server.requests] == [f"bytes={positions[-3][1]}-"]


def test_an_image_is_a_shard_of_one(tmp_path):
    folder = write_images(tmp_path / "i", range(1))
    ((position, image),) = read(folder / "0000.png")
    assert (position, image.content, image.path) == ((1, 0), None, str(folder / "0000.png"))
    assert read(folder / "0000.png", start=position) == []
    assert read(folder / "0000.png", share=(1, 2)) == [((1, 0), None)]


@pytest.mark.parametrize("kind", MAKERS)
def test_damage_is_met_where_it_is(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    content = path.read_bytes()
    if kind.startswith("tar"):
        plain = gzip.decompress(content) if kind == "tar.gz" else content
        second = read(path)[5][0][1]
        plain = plain[:second] + b"\xff" * 512 + plain[second + 512 :]
        path.write_bytes(gzip.compress(plain) if kind == "tar.gz" else plain)
    elif "arrow" in kind:
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-20])
    rows = read_shard(str(path), column="" if kind.startswith("tar") else "image", patience=PATIENCE)
    met = []
    with pytest.raises(DAMAGED):
        for _, image in rows:
            met.append(image.content)
    assert met == [encoded(i) for i in range(len(met))]
    assert len(met) == 5 or not kind.startswith("tar")


def test_a_compressed_tar_that_ends_early(tmp_path):
    path = write_tar(tmp_path / "x.tgz", range(COUNT), "w:gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DAMAGED):
        read(path)


def test_a_shard_that_is_gone(tmp_path):
    with pytest.raises(StreamError, match=r"gone\.tar cannot be opened: No such file"):
        read(tmp_path / "gone.tar")
    with serving(tmp_path) as server, pytest.raises(StreamError, match=r"gone\.parquet cannot be read: .* 404"):
        read(f"{server.url}/gone.parquet")


@pytest.mark.parametrize("name", ["x.parquet", "x.tar"])
def test_a_network_that_stays_away_is_no_damage(tmp_path, name):
    (write_parquet if name == "x.parquet" else write_tar)(tmp_path / name, range(COUNT))
    with serving(tmp_path) as server:
        server.faults = [503] * 100
        with pytest.raises(StreamError, match="gave up"):
            read(f"{server.url}/{name}")


def test_one_image_a_sample(tmp_path):
    """What has no ending, no name or is no image is passed over; of two images in a sample the likelier counts."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("README", ".hidden", "a/1.txt", "a/1.jpg", "a/1.png", "b/1.png", "b/2.depth.png", "b/2.png"):
            tar.addfile(tarfile.TarInfo(name))
        folder = tarfile.TarInfo("c.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert [image.path for _, image in read(tmp_path / "x.tar")] == ["a/1.jpg", "b/1.png", "b/2.png"]
