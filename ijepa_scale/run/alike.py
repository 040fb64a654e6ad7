"""What must be the same on all ranks: code, packages, config; then the run folder and the images that they see."""

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any, Protocol

import ijepa_kernels
import ijepa_scale
from ijepa_scale.config import PretrainConfig, by_key
from ijepa_scale.engine.checkpoint import candidates
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.roll_call import who
from ijepa_scale.run.folder import RunFolder, version_of

PACKAGES = ("torch", "deepspeed", "triton", "numpy")  # what is computed with
OF_A_MACHINE = ("run_dir", "data.cache_dir")  # paths: what is in a run folder is compared by itself
SEEN_SECONDS = 20.0  # in which a machine sees what another has written to a disk that they share


class Images(Protocol):
    """What check_images() asks of images."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...


def start_facts(config: PretrainConfig, **words: Any) -> dict[str, str]:
    """For the roll call: names and values. words: of the command line, beside the config."""
    code = f"{version_of('ijepa-scale')} (sources {code_digest()})"
    keys = {key: json.dumps(value) for key, value in by_key(config).items() if key not in OF_A_MACHINE}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"ijepa-scale": code, "python": python, **versions(), **keys, **{k: str(v) for k, v in words.items()}}


def versions() -> dict[str, str]:
    """Of the packages that steps are computed with."""
    return {name: version_of(name) for name in PACKAGES}


def code_digest() -> str:
    """Of this package's sources: a checkout's version stays while its files change."""
    digest = hashlib.sha256()
    for package in (ijepa_scale, ijepa_kernels):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def check_folder(folder: RunFolder, ranks: Ranks, *, patience: float = SEEN_SECONDS) -> None:
    """ValueError, on all ranks, where one does not see the run folder that the first has locked. All ranks call it."""
    owner = ranks.from_first(folder.owner() if ranks.first else "")
    until = time.monotonic() + patience
    while not (here := folder.owner() == owner) and time.monotonic() < until:
        time.sleep(0.2)
    newest = next((path.name for path in candidates(folder.checkpoints)), "none")
    said = ranks.gather((here, who(ranks.rank), newest))
    _, first, of_first = said[0]
    for sees, other, of_other in said:
        if not sees:
            raise ValueError(
                f"run_dir {folder.path} of {other} is not that of {first}: newest checkpoint {of_other} there, "
                f"{of_first} here; each rank writes its part of a checkpoint: give a folder on a disk that all share"
            )


def check_images(images: Images, ranks: Ranks) -> None:
    """ValueError, on all ranks, where a machine's images are others than those of the first. All ranks call it."""
    said = ranks.gather((who(ranks.rank), len(images), images.digest if ranks.local_rank == 0 else ""))
    first, count, digest = said[0]
    for other, theirs, other_digest in said:
        if theirs != count or other_digest not in ("", digest):
            differ = f"{theirs:,} images there, {count:,} here" if theirs != count else "other names or contents"
            raise ValueError(
                f"data.source {images.name} of {other} is not that of {first}: {differ}; give all machines the same "
                "images"
            )
