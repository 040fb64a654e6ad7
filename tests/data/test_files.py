import os
import subprocess
import sys

import pytest

from ijepa_scale.data.files import cache_path, remove_leftovers, write_whole, written_whole
from ijepa_scale.data.images import open_images
from ijepa_scale.data.scenes.prepare import prepare_scenes
from tests.data.small_sources import write_parquet, write_tar


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "caf\u00e9\n")
    assert path.read_bytes() == "caf\u00e9\n".encode()
    (tmp_path / "b.txt").touch()
    assert path.stat().st_mode == (tmp_path / "b.txt").stat().st_mode  # as the umask says
    (tmp_path / "b.txt").unlink()
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "more")
    assert path.read_text() == "caf\u00e9\n" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_leaves_behind_can_be_removed(tmp_path):
    (tmp_path / ".partial-folder.partial").mkdir()
    code = "import os; from pathlib import Path; from ijepa_scale.data.files import written_whole\n"
    code += f"with written_whole(Path({str(tmp_path)!r}) / 'a.txt'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".partial-folder.partial"]


def failing(descriptor):
    raise OSError(28, "No space left on device")


def test_a_cache_that_cannot_be_written_is_named_with_what_to_set(tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    write_tar(tmp_path / "a.tar", range(2))
    write_parquet(tmp_path / "a.parquet", range(2))
    ways = [
        lambda: open_images(str(tmp_path / "a.tar"), cache_dir=str(cache)),
        lambda: open_images(str(tmp_path / "a.parquet"), cache_dir=str(cache)),
        lambda: prepare_scenes(cache, num_train=1, num_validation=1, image_size=8, seed=0),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=rf"the cache folder {cache}.* cannot be written: .*; set data\.cache_dir"):
            way()


def test_a_home_folder_that_is_not_known_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path("~/x") == tmp_path / "x"
    with pytest.raises(ValueError, match=r"no home folder for the cache ~nobody-here/x; set data\.cache_dir"):
        cache_path("~nobody-here/x")
