from dataclasses import replace

from ijepa_scale.exchange.again import source_of
from ijepa_scale.exchange.load import load
from tests.exchange.test_load import OLD


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
