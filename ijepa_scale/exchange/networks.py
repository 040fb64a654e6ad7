"""What a reader found, before any weight is read, and what load() gives of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

NETWORKS = ("target", "context", "predictor")
ENCODERS = ("target", "context")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A frozen network on the CPU, in fp32, and where it is from.

    name: which network it is: "target", "context" or "predictor"; image_size: pixels a side that it was trained on.
    path: the checkpoint folder or the file that was read. sha256: of what was read. step: that was reached, and config:
    of the run, as config.from_dict() takes it, where they are known. notes: what its user should be told.
    """

    network: nn.Module
    name: str
    image_size: int
    path: Path
    sha256: str
    step: int | None = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a run, a folder or a file. names: those that it holds. read: one of them, by its name.

    known: that names say which encoder a lone one is.
    """

    path: Path
    names: tuple[str, ...]
    read: Callable[[str], Loaded]
    known: bool = True

    @classmethod
    def of_encoder(cls, path: Path, name: str | None, read: Callable[[str], Loaded]) -> "Networks":
        """One encoder. name: which one; None: its format does not say, and it is called "context", as most are."""
        return cls(path=path, names=(name or "context",), read=read, known=name is not None)

    def load(self, network: str) -> Loaded:
        """One network, frozen. A lone encoder answers to "target" and to "context", and a note says which it is.

        Raises ValueError for a network that is not there, and whatever the reader refuses.
        """
        if network not in NETWORKS:
            raise ValueError(f"unknown network {network!r}; choose one of {', '.join(NETWORKS)}")
        there = [name for name in ENCODERS if name in self.names]
        chosen = there[0] if network in ENCODERS and len(there) == 1 else network
        if chosen not in self.names:
            raise ValueError(f"{self.path} holds no {network}; it holds: {', '.join(self.names)}")
        loaded = self.read(chosen)
        loaded.network.eval().requires_grad_(False)
        notes = loaded.notes
        if not self.known:
            notes += (
                f"{self.path} does not say which encoder it holds; those of the I-JEPA release in transformers and timm"
                " are the context encoder, not the target encoder that the paper evaluates",
            )
        elif chosen != network:
            notes += (f"{self.path} holds the {chosen} encoder alone: it is taken for the {network} encoder too",)
        return replace(loaded, name=chosen, notes=notes)
