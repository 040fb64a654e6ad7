"""The folder for what is made once of a source: copies, indices, rendered scenes."""

import errno
import os
from pathlib import Path


def cache_path(path: str) -> Path:
    """An absolute path, the home folder in the place of ~. Raises ValueError where no home folder is known."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for the cache {path}; set data.cache_dir to another") from error


def make_cache(folder: Path) -> Path:
    """The folder, made if need be. Raises ValueError, naming data.cache_dir, where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be written: {error.strerror}; set data.cache_dir to one that can"
        ) from error
    return folder
