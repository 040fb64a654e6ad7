"""Pooled features of labelled images, computed once and kept on disk for every task that comes after."""

import copy
import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ijepa_scale.data.files import make_cache, read_array, write_whole
from ijepa_scale.evals.evaluation import Evaluation, Labelled
from ijepa_scale.evals.extract import extract
from ijepa_scale.evals.stores import forget_half

_log = logging.getLogger(__name__)

VERSION = 1  # of how features are made: raise it whenever they change
LAST = 4  # blocks whose outputs are kept, as the paper's linear probe reads them (arXiv:2301.08243, A.2)
FEATURES, INDICES, FACTS = "features.npy", "indices.npy", "facts.json"


@dataclass(frozen=True)
class Features:
    """Features of labelled images, each of them read.

    blocks: (n, L * D) float32, a read-only map: average-pooled outputs of the last L blocks, each after the final
    LayerNorm, the last one's at the end. labels, indices: (n,) int64, which of the images each is. width: D.
    """

    blocks: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    width: int

    @property
    def last(self) -> np.ndarray:
        """(n, D): the average-pooled output of the network."""
        return self.blocks[:, -self.width :]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a classifier is fitted on: the last block's features, and the labels."""
        return torch.from_numpy(np.array(self.last)), torch.from_numpy(self.labels)


def last_blocks(encoder: nn.Module) -> tuple[int, ...]:
    """Numbers of the blocks whose outputs are kept: the last four, or all of a network that has fewer."""
    depth = len(encoder.blocks)  # type: ignore[arg-type]
    return tuple(range(max(0, depth - LAST), depth))


@functools.lru_cache(maxsize=1)
def encoding_copy(encoder: nn.Module) -> nn.Module:
    """The network as it encodes: in bf16 on CUDA, where that is several times as fast; on a CPU itself."""
    if next(encoder.parameters()).device.type != "cuda":
        return encoder
    return copy.deepcopy(encoder).bfloat16()


def features_of(evaluation: Evaluation, labelled: Labelled, *, stretch: bool = False) -> Features:
    """Features of labelled images: those that are kept from an earlier call, or computed over all ranks and kept.

    stretch: images are resized to a square whole, instead of the centre's being cut out. All ranks call it, and each
    gets them all. What is kept of more images serves for fewer. Images that cannot be read are left out.
    """
    ranks, encoder = evaluation.ranks, evaluation.encoder
    facts = {
        "version": VERSION,
        "weights": evaluation.sha256,
        "images": ranks.from_first(labelled.images.digest if ranks.first else ""),
        "image_size": evaluation.image_size,
        "stretch": stretch,
        "blocks": list(last_blocks(encoder)),
        "heads": encoder.size.heads,  # which weights do not tell
        "dtype": str(next(encoding_copy(encoder).parameters()).dtype).removeprefix("torch."),
    }
    folder = evaluation.keep / _digest(facts)
    found = ranks.from_first(_holding(folder, labelled.indices) if ranks.first else None)
    if found is None:
        found = folder / hashlib.sha256(labelled.indices.tobytes()).hexdigest()[:16]
        _compute(evaluation, labelled, found, facts, stretch=stretch)
    kept, blocks = ranks.together(lambda: _read(found))
    order = np.argsort(kept, kind="stable")
    places = order[np.searchsorted(kept, labelled.indices, sorter=order).clip(max=len(kept) - 1)]
    there = kept[places] == labelled.indices
    whole = len(places) == len(kept) and bool((places == np.arange(len(kept))).all())
    chosen = blocks if whole else blocks[places[there]]  # the map itself, where all of it is asked for in its order
    return Features(chosen, labelled.labels[there], labelled.indices[there], encoder.size.width)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _holding(folder: Path, indices: np.ndarray) -> Path | None:
    """What was kept of these images, or of more."""
    for facts in sorted(folder.glob(f"*/{FACTS}")):
        asked = read_array(facts.parent / INDICES)[0]
        if len(asked) >= len(indices) and np.isin(indices, asked).all():
            return facts.parent
    return None


def _compute(evaluation: Evaluation, labelled: Labelled, folder: Path, facts: dict[str, Any], *, stretch: bool) -> None:
    ranks = evaluation.ranks
    ranks.together(lambda: make_cache(folder) if ranks.first else None)
    extracted = extract(
        {Path(FEATURES).stem: encoding_copy(evaluation.encoder)},
        labelled.images,
        labelled.indices,
        image_size=evaluation.image_size,
        batch_size=evaluation.batch_size,
        ranks=ranks,
        workers=evaluation.workers,
        blocks=last_blocks(evaluation.encoder),
        stretch=stretch,
        folder=folder,
        facts=facts,
        watch=functools.partial(evaluation.watch, f"encoding {labelled.images.name}"),
    )

    def end() -> None:
        if extracted.unreadable:
            index, reason = next(iter(extracted.unreadable.items()))
            _log.warning(
                "%s: %d of %d images cannot be read and are left out, the first, %s, because: %s",
                labelled.images.name,
                len(extracted.unreadable),
                len(labelled),
                labelled.images.sample_id(index),
                reason,
            )
        asked = np.full(len(labelled.indices), -1)
        asked[: len(extracted.indices)] = extracted.indices
        np.save(folder / INDICES, np.stack([labelled.indices, asked]))
        write_whole(folder / FACTS, json.dumps(facts, indent=2) + "\n")  # a folder that has it is whole
        forget_half(folder)

    ranks.together(lambda: end() if ranks.first else None)


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which images were read, and their features. ValueError where this machine does not see them."""
    if not (folder / FACTS).is_file():
        raise ValueError(f"{folder} is not there on every node: give --cache-dir on a disk that all of them see")
    read = read_array(folder / INDICES)[1]
    return read[read >= 0], read_array(folder / FEATURES)
