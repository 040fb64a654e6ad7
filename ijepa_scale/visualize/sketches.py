"""What features look like: a decoder's images of them, and a flow's samples. Arrays in, arrays out.

B images, N patches, K patches of a block, D width of the features, P pixels of a patch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_kernels.patchify import IMAGENET_MEAN, IMAGENET_STD, patchify
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Packed, pack_masks
from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import run_blocks
from ijepa_scale.models.sketch import SketchDecoder, SketchFlow
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.sketch import conditioned, features_of, standard_normal
from ijepa_scale.visualize.features import AT_ONCE

FLOW_STEPS = 50  # of the sampler


@torch.no_grad()
def true_features(encoder: VisionTransformer, images_BCHW: np.ndarray, layer: int) -> np.ndarray:
    """What a sketch is drawn from, of every patch, (B, N, D) float32. layer: the block, from 1."""

    def encoded(images: torch.Tensor) -> torch.Tensor:
        return features_of(encoder, _pixels(encoder, images), (layer,))[0]

    return _by_parts(encoded, encoder, images_BCHW)


@torch.no_grad()
def features_around(
    encoder: VisionTransformer, images_BCHW: np.ndarray, blocks_BK: np.ndarray, layer: int
) -> np.ndarray:
    """Of an encoder that does not see a block of each image: features of the others, in their order, (B, N - K, D)."""
    everything, found = np.arange(encoder.grid.num_patches), []
    for start in range(0, len(images_BCHW), AT_ONCE):
        images = torch.from_numpy(images_BCHW[start : start + AT_ONCE]).to(encoder.norm.weight.device)
        blocks = blocks_BK[start : start + AT_ONCE]
        masks = pack_masks(
            [np.delete(everything, block) for block in blocks], [[block] for block in blocks], len(everything)
        )
        seen_TD = _of_block(encoder, images, masks.context.to(images.device), layer).float()
        normalized_TD = F.layer_norm(seen_TD, seen_TD.shape[-1:])
        found.append(normalized_TD.unflatten(0, (len(images), -1)).cpu().numpy())
    return np.concatenate(found)


def of_layer(predicted_BKF: np.ndarray, layers: Sequence[int], layer: int) -> np.ndarray:
    """Of predictions for several target layers those for one, (B, K, D). ValueError for one that is not there."""
    if layer not in layers:
        raise ValueError(
            f"the decoder draws features of block {layer}, and what is predicted are those of "
            f"{', '.join(map(str, layers))}: train another with sketch.target_layer={layers[-1]}"
        )
    return np.split(predicted_BKF, len(layers), axis=-1)[list(layers).index(layer)]


def _of_block(encoder: VisionTransformer, images: torch.Tensor, packed: Packed, layer: int) -> torch.Tensor:
    """Of packed tokens what a block puts out, from 1; of the last with the final LayerNorm."""
    if layer == len(encoder.blocks):
        return encoder(images, packed)  # type: ignore[return-value]
    tokens_TD = encoder.patch_embed(images, packed.indices_T, encoder.dtype)
    places = packed.indices_T % encoder.grid.num_patches
    tokens_TD = tokens_TD + encoder.pos_embed[0].to(encoder.dtype).index_select(0, places)
    sequences = Sequences(packed.cu_seqlens, packed.max_seqlen, packed.num_tokens)
    return run_blocks(encoder.blocks[:layer], tokens_TD, sequences)


def filled(around_BRD: np.ndarray, inside_BKD: np.ndarray, blocks_BK: np.ndarray) -> np.ndarray:
    """Features of all patches: of a block's and of those around it, (B, N, D)."""
    images, num_patches = len(blocks_BK), around_BRD.shape[1] + blocks_BK.shape[1]
    features = np.empty((images, num_patches, around_BRD.shape[2]), dtype=np.float32)
    for image, block in enumerate(blocks_BK):
        features[image, np.delete(np.arange(num_patches), block)] = around_BRD[image]
        features[image, block] = inside_BKD[image]
    return features


@torch.no_grad()
def decoded(decoder: SketchDecoder, features_BND: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """A decoder's images of features, (B, 3, H, W) uint8."""
    device = decoder.proj.weight.device
    parts = torch.from_numpy(features_BND).split(AT_ONCE)
    return np.concatenate([images_of(decoder(part.to(device)).float().cpu(), grid) for part in parts])


@torch.no_grad()
def samples(
    flow: SketchFlow,
    features_BKD: np.ndarray,
    blocks_BK: np.ndarray,
    grid: PatchGrid,
    *,
    condition: str,
    predicted: bool,
    seeds: Sequence[int],
) -> np.ndarray:
    """A flow's images by the features of a block alone, one each, (B, 3, H, W) uint8. seeds: of each image's noise.

    condition: tokens or mean, as the flow was trained. predicted: whether the features are predictions, or true ones.
    """
    device, width = flow.proj.weight.device, flow.proj.out_features
    features = np.zeros((len(blocks_BK), grid.num_patches, features_BKD.shape[2]), dtype=np.float32)
    known = np.zeros(features.shape[:2], dtype=bool)
    np.put_along_axis(features, blocks_BK[..., None], features_BKD, axis=1)
    np.put_along_axis(known, blocks_BK, True, axis=1)
    drawn = []
    for start in range(0, len(features), AT_ONCE):
        told = torch.from_numpy(features[start : start + AT_ONCE]).to(device)
        box = torch.from_numpy(known[start : start + AT_ONCE]).to(device)
        noise = standard_normal(seeds[start : start + AT_ONCE], told.new_empty(len(told), grid.num_patches, width))
        whether = torch.full((len(told),), predicted, device=device)
        pixels = flow.sample(conditioned(told, box, condition), box, whether, noise, steps=FLOW_STEPS)
        drawn.append(images_of(pixels.cpu(), grid))
    return np.concatenate(drawn)


def images_of(pixels_BNP: torch.Tensor, grid: PatchGrid) -> np.ndarray:
    """Normalized pixels of patches, channels first -> images, (B, 3, H, W) uint8."""
    side = round((pixels_BNP.shape[2] // 3) ** 0.5)
    parts = pixels_BNP.numpy().reshape(-1, grid.rows, grid.columns, 3, side, side)
    images = parts.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, grid.rows * side, grid.columns * side)
    levels = 255 * (images * np.reshape(IMAGENET_STD, (3, 1, 1)) + np.reshape(IMAGENET_MEAN, (3, 1, 1)))
    return levels.round().clip(0, 255).astype(np.uint8)


def pixel_errors(drawn_BCHW: np.ndarray, images_BCHW: np.ndarray, blocks_BK: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Mean absolute difference in the patches of each image's block, in percent of the range of a pixel, (B, K)."""
    off = np.abs(drawn_BCHW.astype(np.float32) - images_BCHW) / 2.55
    images, channels, height, width = off.shape
    parts = off.reshape(images, channels, grid.rows, height // grid.rows, grid.columns, width // grid.columns)
    of_patches = parts.mean(axis=(1, 3, 5)).reshape(images, grid.num_patches)
    return np.take_along_axis(of_patches, blocks_BK, axis=1)


def _pixels(encoder: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    patch_size = encoder.patch_embed.patch_size
    return patchify(images, patch_size, dtype=torch.float32).unflatten(0, (len(images), -1))


def _by_parts(compute: Callable[[torch.Tensor], torch.Tensor], network: Any, images: np.ndarray) -> np.ndarray:
    parts = torch.from_numpy(images).split(AT_ONCE)
    return np.concatenate([compute(part.to(network.norm.weight.device)).cpu().numpy() for part in parts])
