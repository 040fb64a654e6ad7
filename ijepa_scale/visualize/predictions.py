"""What the predictor knows of a block that it does not see: cosines with the truth, beside what guesses would get.

B images, N patches, K patches of a block, T = B * K, D the encoder's width, F of a prediction: D for each target layer.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import pack_masks
from ijepa_scale.objectives.ijepa import IJepa
from ijepa_scale.visualize.features import AT_ONCE, unit


@torch.no_grad()
def target_features(model: IJepa, images_BCHW: np.ndarray) -> np.ndarray:
    """What a perfect predictor would say of every patch, (B, N, F) float32: normalized as the loss normalizes it."""
    device, parts = model.predictor.mask_token.device, []
    for images in torch.from_numpy(images_BCHW).to(device).split(AT_ONCE):
        rows = torch.arange(len(images) * model.target_encoder.grid.num_patches, device=device)
        normalized = [F.layer_norm(layer.float(), layer.shape[-1:]) for layer in model.targets(images, rows)]
        parts.append(torch.cat(normalized, dim=1).unflatten(0, (len(images), -1)).cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def predictions(model: IJepa, images_BCHW: np.ndarray, blocks_BK: np.ndarray) -> np.ndarray:
    """What the predictor says of a block of each image, seeing all that is outside it, (B, K, F) float32."""
    device, parts = model.predictor.mask_token.device, []
    everything = np.arange(model.target_encoder.grid.num_patches)
    for start in range(0, len(images_BCHW), AT_ONCE):
        images = torch.from_numpy(images_BCHW[start : start + AT_ONCE]).to(device)
        blocks = blocks_BK[start : start + AT_ONCE]
        outside = [np.delete(everything, block) for block in blocks]
        masks = pack_masks(outside, [[block] for block in blocks], len(everything)).to(device)
        predicted_TF = model.predictor(model.context_encoder(images, masks.context), masks)
        parts.append(predicted_TF.float().unflatten(0, (len(images), -1)).cpu().numpy())
    return np.concatenate(parts)


def mean_features(targets_BNF: np.ndarray, blocks_BK: np.ndarray) -> np.ndarray:
    """The mean target feature at each place of each image's block, over all other images, (B, K, F)."""
    own_BKF = in_blocks(targets_BNF, blocks_BK)
    return (targets_BNF.sum(axis=0)[blocks_BK] - own_BKF) / (len(targets_BNF) - 1)


def in_blocks(values_BN: np.ndarray, blocks_BK: np.ndarray) -> np.ndarray:
    """Of each image what is at the patches of its block: (B, N, ...) -> (B, K, ...)."""
    return values_BN[np.arange(len(values_BN))[:, None], blocks_BK]


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Along the last dimension."""
    return (unit(one) * unit(other)).sum(axis=-1)


def mean_and_error(cosines_BK: np.ndarray) -> tuple[float, float]:
    """The mean over images, and its standard error over these: patches of one image are no separate witnesses."""
    of_image = cosines_BK.mean(axis=1, dtype=np.float64)
    return float(of_image.mean()), float(of_image.std(ddof=1) / np.sqrt(len(of_image)))


def compared(cosines: Mapping[str, np.ndarray]) -> list[str]:
    """In words, the mean of each, (B, K) by its name, and by how much the first is above each of the others."""
    means = {name: mean_and_error(values) for name, values in cosines.items()}
    said = [f"{name} {mean:.3f} ±{error:.3f}" for name, (mean, error) in means.items()]
    first, *others = cosines
    for name in others:
        gain, error = mean_and_error(cosines[first] - cosines[name])  # image by image: what they share cancels
        said.append(f"{first} less {name} {gain:+.3f} ±{error:.3f}")
    return said


def over_grid(values_K: np.ndarray, block_K: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """A block's values on the patch grid, (rows, columns), NaN elsewhere."""
    spread = np.full(grid.num_patches, np.nan)
    spread[block_K] = values_K
    return spread.reshape(grid.shape)


def pasted(
    image: int, block_K: np.ndarray, images_BCHW: np.ndarray, found_K: np.ndarray, grid: PatchGrid
) -> np.ndarray:
    """An image with the pixels of other patches in the place of its block, (H, W, 3) uint8.

    found_K: for each of the block's patches another one, image * num_patches + patch.
    """
    pixels = images_BCHW[image].copy()
    tall, wide = pixels.shape[1] // grid.rows, pixels.shape[2] // grid.columns

    def part(patch: int) -> tuple[slice, slice, slice]:
        row, column = divmod(patch, grid.columns)
        return slice(None), slice(row * tall, (row + 1) * tall), slice(column * wide, (column + 1) * wide)

    for patch, found in zip(block_K.tolist(), found_K.tolist(), strict=True):
        source, there = divmod(found, grid.num_patches)
        pixels[part(patch)] = images_BCHW[source][part(there)]
    return pixels.transpose(1, 2, 0)
