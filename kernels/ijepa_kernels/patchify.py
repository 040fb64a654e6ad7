"""uint8 images -> normalized rows of pixels, only for the patches asked for.

B images of C channels, N patches an image, T rows, p the side of a patch.
"""

import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patchify(
    images_BCHW: torch.Tensor, patch_size: int, *, indices_T: torch.Tensor | None = None, dtype: torch.dtype
) -> torch.Tensor:
    """Normalized pixels of patches, so that the patch embedding is one matrix product over the patches needed.

    images_BCHW: (B, 3, H, W) uint8, sides multiples of patch_size. indices_T: (T,) integers, image * N + patch; None:
    all patches in order. Returns (T, 3 * p * p) in dtype, (value / 255 - mean) / std with ImageNet's mean and std,
    channels first as a Conv2d weight flattens.
    """
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images_BCHW.shape)} {images_BCHW.dtype}")
    batch, channels, height, width = images_BCHW.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"image sides {height} x {width} are not multiples of the patch size {p}")
    patches = images_BCHW.view(batch, channels, height // p, p, width // p, p)
    if indices_T is None:
        pixels = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, p * p)
    else:
        image = indices_T.long().div(height // p * (width // p), rounding_mode="floor")
        patch = indices_T.long() % (height // p * (width // p))
        row, column = patch.div(width // p, rounding_mode="floor"), patch % (width // p)
        # Advanced indices apart from one another: their dimension comes first, (T, C, p, p).
        pixels = patches[image, :, row, :, column].reshape(-1, channels, p * p)
    compute = dtype if dtype == torch.float64 else torch.float32
    mean = torch.tensor(IMAGENET_MEAN, dtype=compute, device=images_BCHW.device)[:, None]
    std = torch.tensor(IMAGENET_STD, dtype=compute, device=images_BCHW.device)[:, None]
    return pixels.to(compute).div_(255).sub_(mean).div_(std).flatten(1).to(dtype)
