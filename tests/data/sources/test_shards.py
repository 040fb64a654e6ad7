from ijepa_scale.data.sources.remote import Patience
from ijepa_scale.data.sources.shards import first_rows, shard_kind
from tests.data.streams.test_reading import COUNT, MAKERS


def test_kinds():
    kinds = {"a.parquet": "parquet", "http://x/a.TAR?b=1#c": "tar", "a.tgz": "tar", "a.jpg": "image", "a.txt": None}
    assert {name: shard_kind(name) for name in kinds} == kinds


def test_first_rows(tmp_path):
    for kind in ("parquet", "binary", "arrow stream", "arrow file"):
        path = MAKERS[kind](tmp_path)
        for count in (0, 1, 5, 100):
            table = first_rows(str(path), count, Patience(0))
            assert table.num_rows == min(count, COUNT) and table.column_names == ["image"]
