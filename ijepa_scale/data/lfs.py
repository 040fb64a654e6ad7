"""Pointers of Git LFS: the short texts that stand in a clone for files that were not pulled."""

import os

_START = b"version https://git-lfs.github.com/spec/"
_LONGEST = 1024  # bytes, by the specification of Git LFS

LFS_ADVICE = "Git-LFS pointers (short texts in place of the files; run `git lfs pull` in the clone to have these)"


def is_pointer(content: bytes) -> bool:
    """Whether the content of a file is a pointer."""
    return content.startswith(_START) and len(content) < _LONGEST


def is_pointer_file(path: str) -> bool:
    """The same of a file, whose content is read only where it is as short as that."""
    try:
        if os.path.getsize(path) >= _LONGEST:
            return False
        with open(path, "rb") as file:
            return is_pointer(file.read())
    except OSError:  # a broken link, or no permission: reading it as data tells
        return False
