"""Encoders as ONNX graphs: uint8 images in, patch features and their average out. Written, not read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_kernels.patchify import IMAGENET_MEAN, IMAGENET_STD
from ijepa_scale.exchange.networks import Loaded
from ijepa_scale.exchange.record import KEY, Record
from ijepa_scale.extras import needed

FILE = "model.onnx"
INPUT, PATCHES, POOLED = "images", "patch_features", "pooled_features"
OPSET = 18
TOLERANCE = 1e-4  # of features, whose standard deviation is about 1: rounding in fp32 gives a tenth of it
INSIDE_BYTES = 1 << 30  # up to here weights are in the graph's own file, which cannot hold two gigabytes


class PlainEncoder(nn.Module):
    """An encoder in operations that ONNX has: no packed tokens, no kernels of ours.

    The weights are the encoder's own, not copies.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) uint8 -> the patches' features, (B, N, D), and their average, (B, D); fp32."""
        pixels = (images_BCHW.float() / 255 - self.mean) / self.std
        patches = self.encoder.patch_embed.proj
        tokens = F.conv2d(pixels, patches.weight, patches.bias, stride=patches.stride).flatten(2).transpose(1, 2)
        tokens = tokens + self.encoder.pos_embed
        for block in self.encoder.blocks:
            qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, head width) each
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + block.attn.proj(mixed)
            tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
        tokens = self.encoder.norm(tokens)
        return tokens, tokens.mean(dim=1)


@torch.no_grad()
def write(loaded: Loaded, folder: Path) -> None:
    """model.onnx, opened again by onnxruntime and compared with the encoder on one image and on three.

    Raises ValueError where a package is missing, and where the graph's features are not the encoder's.
    """
    needed("onnx", "onnxscript", "onnxruntime", extra="export")
    record = Record.of(loaded)
    encoder: Any = loaded.network
    images = _noise(3, record.image_size)
    program = torch.onnx.export(
        PlainEncoder(encoder).eval(),
        (images[:2],),
        input_names=[INPUT],
        output_names=[PATCHES, POOLED],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # of dynamo=True
    program.model.metadata_props.update(
        {KEY: json.dumps(asdict(record)), "images": "uint8 RGB, 0..255, not normalized: the graph does that"}
    )
    size_bytes = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    program.save(str(folder / FILE), external_data=size_bytes > INSIDE_BYTES)
    for count in (1, 3):
        tokens = encoder(images[:count])
        _check(folder / FILE, images[:count].numpy(), {PATCHES: tokens.numpy(), POOLED: tokens.mean(dim=1).numpy()})


def _noise(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def _check(path: Path, images: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    session = needed("onnxruntime", extra="export").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for name, values in expected.items():
        (found,) = session.run([name], {INPUT: images})
        difference = float(np.abs(found - values).max()) if found.shape == values.shape else float("nan")
        if not difference <= TOLERANCE:
            raise ValueError(
                f"onnxruntime's {name} of {len(images)} images differ by {difference:.2g} from the encoder's, "
                f"{TOLERANCE:g} is allowed; another version of onnxruntime or torch may do better"
            )
