"""The target encoder of a run of our own."""

from pathlib import Path

import torch

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig, from_dict
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.models.vit import VisionTransformer


def load_run(path: str | Path) -> tuple[VisionTransformer, PretrainConfig, Checkpoint]:
    """The target encoder of a run folder's newest whole checkpoint, or of a checkpoint folder; on a GPU if any.

    The weights are the fp32 EMA. Raises ValueError where there is no checkpoint that can be read.
    """
    path = Path(path)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    found: Checkpoint | None
    if (path / checkpoints.MANIFEST).is_file():
        found, complaint = checkpoints.verify(path, alone)
        if found is None:
            raise ValueError(f"{path} cannot be used: {complaint}")
    else:
        if not checkpoints.candidates(path / "checkpoints"):
            raise ValueError(f"{path} is no run: there is no checkpoint in {path / 'checkpoints'}; give a run folder")
        found, skipped = checkpoints.newest_good(path / "checkpoints", alone)
        for complaint in skipped:
            print(f"warning: skipped a checkpoint that is not whole: {complaint}", flush=True)
    assert found is not None  # newest_good() raises where checkpoints exist and none is whole
    config = from_dict(found.manifest["config"])
    encoder = build.build_encoder(config)
    build.load_target_encoder(encoder, found)
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu"), config, found
