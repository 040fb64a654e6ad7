"""The one loader: a run, a checkpoint or a file of another project -> one of its networks."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ijepa_scale.exchange.reference import load_reference_checkpoint
from ijepa_scale.exchange.run import find_checkpoint, read_network

NETWORKS = ("target", "context", "predictor")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A frozen network on the CPU, in fp32, and where it is from.

    image_size: pixels a side that it was trained on. path: the checkpoint folder or the file that was read. sha256: of
    what was read. step: that was reached, where it is known. notes: what its user should be told.
    """

    network: nn.Module
    image_size: int
    path: Path
    sha256: str
    step: int | None = None
    notes: tuple[str, ...] = ()


def load(path: str | Path, network: str = "target") -> Loaded:
    """One network of a run folder (its newest whole checkpoint), a checkpoint folder, or a file of the reference.

    network: "target" (the EMA of the context encoder), "context" or "predictor".
    Raises ValueError where there is nothing, something else, or no whole checkpoint.
    """
    path = Path(path)
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; choose one of {', '.join(NETWORKS)}")
    for fits, read in READERS.values():
        if fits(path):
            loaded = read(path, network)
            loaded.network.eval().requires_grad_(False)
            return loaded
    raise ValueError(f"there is no {path}; give {', or '.join(READERS)}")


def load_first(path: str | Path, networks: Sequence[str]) -> tuple[Loaded, str]:
    """The first of these networks that there is, and which one it is: not every objective and file has a target.

    Raises the ValueError of load() for the first of them where there is none.
    """
    refused = []
    for network in networks:
        try:
            return load(path, network), network
        except ValueError as error:  # there is no such network, or nothing can be read at all: then none is
            refused.append(error)
    raise refused[0]


def _of_run(path: Path, network: str) -> Loaded:
    found, notes = find_checkpoint(path)
    module, config = read_network(found, network)
    return Loaded(
        network=module,
        image_size=config.data.image_size,
        path=found.path,
        sha256=found.manifest["sha256"],
        step=found.step,
        notes=tuple(notes),
    )


def _of_reference(path: Path, network: str) -> Loaded:
    model = load_reference_checkpoint(path)
    modules = {"target": model.target_encoder, "context": model.context_encoder, "predictor": model.predictor}
    return Loaded(
        network=modules[network],
        image_size=model.target_encoder.grid.rows * model.target_encoder.patch_embed.patch_size,
        path=path,
        sha256=_sha256(modules[network]),
    )


def _sha256(network: nn.Module) -> str:
    """Of its weights: a whole file also holds moments, and would take its time."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


# What may be loaded, in words -> (whether a path is that, what reads it). Another format is one more entry.
READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, str], Loaded]]] = {
    "a run folder or one of its checkpoints": (Path.is_dir, _of_run),
    "a checkpoint file of the I-JEPA reference": (Path.is_file, _of_reference),
}
