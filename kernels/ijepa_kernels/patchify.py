"""uint8 images -> normalized rows of pixels, only for the patches asked for.

B images of C channels, N patches an image, T rows, p the side of a patch, K columns: 3 * p * p pixels, then zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_kernels.dispatch import blocks, check_indices, jit, launch, tl, use_kernels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_PADDING = 63  # columns

# --- definition


def patchify_definition(
    images_BCHW: torch.Tensor,
    patch_size: int,
    *,
    indices_T: torch.Tensor | None = None,
    dtype: torch.dtype,
    columns: int | None = None,
) -> torch.Tensor:
    batch, channels, height, width = images_BCHW.shape
    p = patch_size
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
    rows_TK = pixels.to(compute).div_(255).sub_(mean).div_(std).flatten(1).to(dtype)
    padding = (columns or 3 * p * p) - 3 * p * p
    return F.pad(rows_TK, (0, padding)) if padding else rows_TK


# --- kernel: a program makes BLOCK_T rows of one channel


@jit
def _patchify_kernel(
    images_ptr,  # (B, 3, H, W) in, uint8
    indices_ptr,  # (T,) in, or not used
    out_ptr,  # (T, K) out
    T, HEIGHT, WIDTH, COLUMNS, PATCHES,  # COLUMNS patches across, PATCHES an image
    P: tl.constexpr, K: tl.constexpr, HAS_INDICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1)
    at = tl.arange(0, BLOCK_P)  # of the P * P pixels
    mask = (t < T)[:, None] & (at < P * P)[None, :]
    index = t.to(tl.int32)  # divided in 32 bits, which is faster
    if HAS_INDICES:
        index = tl.load(indices_ptr + t, mask=t < T, other=0).to(tl.int32)
    image, patch = (index // PATCHES).to(tl.int64), index % PATCHES
    top, left = patch // COLUMNS * P, patch % COLUMNS * P
    corner = ((image * 3 + channel) * HEIGHT + top) * WIDTH + left
    pixels = tl.load(images_ptr + corner[:, None] + (at // P * WIDTH + at % P)[None, :], mask=mask, other=0)
    mean = tl.where(channel == 0, 0.485, tl.where(channel == 1, 0.456, 0.406))  # IMAGENET_MEAN
    std = tl.where(channel == 0, 0.229, tl.where(channel == 1, 0.224, 0.225))  # IMAGENET_STD
    values = (pixels.to(tl.float32) / 255 - mean) / std
    out = out_ptr + t[:, None] * K + channel * P * P
    tl.store(out + at[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)
    if K > 3 * P * P:
        past = tl.arange(0, 64)  # MOST_PADDING, and a power of two
        last = (channel == 2) & (t < T)[:, None] & (past < K - 3 * P * P)[None, :]
        tl.store(out + P * P + past[None, :], tl.zeros((BLOCK_T, 64), out_ptr.dtype.element_ty), mask=last)


# --- operation


@torch.library.triton_op("ijepa::patchify", mutates_args={})
def _patchify(
    images: torch.Tensor, patch_size: int, indices: torch.Tensor | None, dtype: torch.dtype, columns: int
) -> torch.Tensor:
    batch, channels, height, width = images.shape
    num_patches = height // patch_size * (width // patch_size)
    count = batch * num_patches if indices is None else indices.shape[0]
    out = images.new_empty(count, columns, dtype=dtype)
    pixels = 1 << max(4, (patch_size**2 - 1).bit_length())
    rows = max(1, 2048 // pixels)
    launch(
        _patchify_kernel,
        (blocks(count, rows), channels),
        *(images, images if indices is None else indices, out),
        *(count, height, width, width // patch_size, num_patches),
        P=patch_size,
        K=columns,
        HAS_INDICES=indices is not None,
        BLOCK_T=rows,
        BLOCK_P=pixels,
    )
    return out


# --- public


def patchify(
    images_BCHW: torch.Tensor,
    patch_size: int,
    *,
    indices_T: torch.Tensor | None = None,
    dtype: torch.dtype,
    columns: int | None = None,
) -> torch.Tensor:
    """Normalized pixels of patches, so that the patch embedding is one matrix product over the patches needed.

    images_BCHW: (B, 3, H, W) uint8, sides multiples of patch_size. indices_T: (T,) int32 or int64, image * N + patch;
    None: all patches in order. columns: K, 3 * p * p and up to 63 more, which are zeros; None: none more. Returns
    (T, K) in dtype, (value / 255 - mean) / std with ImageNet's mean and std, channels first as a Conv2d weight
    flattens. Raises ValueError for another type, shape or device.
    """
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images_BCHW.shape)} {images_BCHW.dtype}")
    height, width = images_BCHW.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image sides {height} x {width} are not multiples of the patch size {patch_size}")
    columns = columns or 3 * patch_size**2
    if not 0 <= columns - 3 * patch_size**2 <= MOST_PADDING:
        raise ValueError(f"columns must be {3 * patch_size**2} and at most {MOST_PADDING} more, got {columns}")
    if indices_T is not None:
        patches = images_BCHW.shape[0] * (height // patch_size) * (width // patch_size)
        check_indices(images_BCHW.device, indices_T=(indices_T, patches))
    if not use_kernels(images_BCHW) or dtype == torch.float64:  # the kernel computes in fp32
        return patchify_definition(images_BCHW, patch_size, indices_T=indices_T, dtype=dtype, columns=columns)
    indices = None if indices_T is None else indices_T.contiguous()
    return _patchify(images_BCHW.contiguous(), patch_size, indices, dtype, columns)
