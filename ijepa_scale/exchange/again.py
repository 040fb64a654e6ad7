"""What to give load() to read the same once more."""

from pathlib import Path

from ijepa_scale.exchange.networks import Loaded


def source_of(what: str | Path, loaded: Loaded) -> str:
    """An absolute path, or a name such as timm's. Of a run it is the checkpoint: its newest one will be another.

    what: that load() was given, and gave loaded.
    """
    path = loaded.path if loaded.path.is_dir() else Path(what)
    return str(path.absolute()) if path.exists() else str(what)
