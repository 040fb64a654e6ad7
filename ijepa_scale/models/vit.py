"""The vision transformer on packed tokens, and its table of sizes. B images, N patches, T packed tokens, D width."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_kernels.patchify import patchify
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Packed
from ijepa_scale.models.attention import Attend, Sequences
from ijepa_scale.models.blocks import NORM_EPS, Block, ViTSize, rows_after, run_block, run_blocks
from ijepa_scale.models.positions import resized_pos_embed, sincos_pos_embed

VIT_SIZES = {
    "vit_tiny": ViTSize(width=192, depth=12, heads=3, mlp_width=768),
    "vit_small": ViTSize(width=384, depth=12, heads=6, mlp_width=1536),
    "vit_base": ViTSize(width=768, depth=12, heads=12, mlp_width=3072),
    "vit_large": ViTSize(width=1024, depth=24, heads=16, mlp_width=4096),
    "vit_huge": ViTSize(width=1280, depth=32, heads=16, mlp_width=5120),
    "vit_giant": ViTSize(width=1408, depth=40, heads=16, mlp_width=6144),  # "ViT-g"; the paper's table calls it G/16
    "vit_gigantic": ViTSize(width=1664, depth=48, heads=16, mlp_width=8192),  # ViT-G
}

# Where no gradient is kept, a CPU encodes about so many tokens at a time: what passes from one operation to the next
# then stays in its caches. Measured in docs/lab/speed.md.
CPU_TOKENS = 4096


class PatchProjection(nn.Conv2d):
    """The patch embedding's weights as public checkpoints hold them, (D, 3, p, p), applied to rows of pixels.

    pixels_TK: as of patchify(), K = 3 * p * p or more.
    """

    def forward(self, pixels_TK: torch.Tensor) -> torch.Tensor:
        weight_DK = self.weight.flatten(1)
        if padding := pixels_TK.shape[1] - weight_DK.shape[1]:
            weight_DK = F.pad(weight_DK, (0, padding))
        return F.linear(pixels_TK, weight_DK, self.bias)


def pixel_columns(patch_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Columns of a patch's row of pixels: 3 * p * p, or on a GPU zeros more, up to a multiple of 64.

    There matrix kernels are fast where rows begin at multiples of 16 bytes; those of patches of 14 pixels, in bf16, do
    not.
    """
    pixels = 3 * patch_size**2
    aligned = device.type != "cuda" or pixels * dtype.itemsize % 16 == 0
    return pixels if aligned else -(-pixels // 64) * 64


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: torch.Tensor, indices_T: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        columns = pixel_columns(self.patch_size, dtype, images_BCHW.device)
        return self.proj(patchify(images_BCHW, self.patch_size, indices_T=indices_T, dtype=dtype, columns=columns))


class VisionTransformer(nn.Module):
    """ViT without a class token, with fixed position embeddings; its final LayerNorm is part of it.

    It is made for square images of one size, and takes whole images of any other whose sides are multiples of the
    patch: see positions.resized_pos_embed().
    """

    pos_embed: torch.Tensor

    def __init__(self, size: ViTSize, *, image_size: int, patch_size: int, attend: Attend | None = None):
        """attend: the kernel for packed tokens; whole images are of one length and go to PyTorch's own attention."""
        super().__init__()
        self.size = size
        self.attend = attend
        self.grid = PatchGrid.of_image(image_size, image_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, size.width)
        self.register_buffer("pos_embed", sincos_pos_embed(size.width, self.grid)[None])  # (1, N, D), as checkpoints
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    @property
    def dtype(self) -> torch.dtype:
        # Not norm.weight: at ZeRO-3 that gathers it, and counts it as one of this module itself from then on.
        return next(self.norm.parameters()).dtype

    def grid_of(self, images_BCHW: torch.Tensor) -> PatchGrid:
        """The patch grid of such images. ValueError for sides that are not multiples of the patch."""
        return PatchGrid.of_image(images_BCHW.shape[-2], images_BCHW.shape[-1], self.patch_embed.patch_size)

    def forward(
        self,
        images_BCHW: torch.Tensor,
        packed: Packed | None = None,
        rows_K: torch.Tensor | None = None,
        *,
        keep: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode the tokens named by packed, or all of them.

        images_BCHW: (B, 3, H, W) uint8, of the model's image size where packed is given, else of any whose sides are
        multiples of the patch. rows_K: (K,) integers in ascending order, the rows wanted of the tokens.
        keep: (blocks, B, 2), of whole images, factors of what each block's attention and MLP add: see run_blocks().
        layers: of whole images, blocks whose outputs are wanted at the rows: see rows_after().
        Returns a list, (K, D) of each of the layers, without the final LayerNorm; else (K, D) where rows are given,
        else (T, D) for packed tokens, else (B, N, D).
        Raises ValueError for images of another size.
        """
        batch, grid = images_BCHW.shape[0], self.grid_of(images_BCHW)
        if packed is not None:
            assert keep is None and not layers, "drop path and layers are of whole images"
            if grid != self.grid:
                raise ValueError(
                    f"packed tokens are of images of {self.grid.shape} patches, got images of {grid.shape}; whole "
                    "images may be of any size"
                )
            tokens_TD = self.patch_embed(images_BCHW, packed.indices_T, self.dtype)
            positions_ND = self.pos_embed[0].to(self.dtype)
            tokens_TD = tokens_TD + positions_ND.index_select(0, packed.indices_T % grid.num_patches)
            sequences = Sequences(packed.cu_seqlens, packed.max_seqlen, packed.num_tokens, self.attend)
            return self.norm(run_blocks(self.blocks, tokens_TD, sequences, rows_K))
        if layers:
            assert rows_K is not None and keep is None, "of layers some rows are wanted, and of all blocks"
            return self._whole(images_BCHW, rows_K, None, layers)
        (tokens_TD,) = self._whole(images_BCHW, rows_K, keep, ())
        return tokens_TD if rows_K is not None else tokens_TD.view(batch, grid.num_patches, -1)

    def _whole(
        self, images_BCHW: torch.Tensor, rows_K: torch.Tensor | None, keep: torch.Tensor | None, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """Whole images as forward() says: of each of the layers, or of the last block alone where none is named."""
        batch, part = images_BCHW.shape[0], self._images_at_once(images_BCHW)
        encoded: list[list[torch.Tensor]] = []  # of some images at a time
        for start in range(0, batch, part):
            tokens_TD, sequences = self._embed(images_BCHW[start : start + part])
            # All at once: the rows are not looked at, which on a device would be waited for.
            rows = (
                rows_K if part >= batch else _rows_between(rows_K, start, part, self.grid_of(images_BCHW).num_patches)
            )
            if layers and rows is not None:
                outputs = rows_after(self.blocks, tokens_TD, sequences, rows, layers)
            else:
                kept = None if keep is None else keep[:, start : start + part]
                outputs = [self.norm(run_blocks(self.blocks, tokens_TD, sequences, rows, kept))]
            encoded.append(outputs)
        return encoded[0] if len(encoded) == 1 else [torch.cat(outputs) for outputs in zip(*encoded, strict=True)]

    def intermediate(
        self, images_BCHW: torch.Tensor, blocks: Sequence[int], *, norm: bool = True, maps: bool = False
    ) -> list[torch.Tensor]:
        """Outputs of chosen blocks, in the order asked for: each (B, N, D), or as maps (B, rows, columns, D).

        images_BCHW: (B, 3, H, W) uint8, of any size whose sides are multiples of the patch. blocks: from 0, or from the
        end with -1 for the last; later ones are not computed. norm: with the final LayerNorm on each, as the paper's
        concatenation of the last four has it (I-JEPA, arXiv:2301.08243, A.2). Raises ValueError for a block that is not
        there.
        """
        grid = self.grid_of(images_BCHW)

        def output(block: int, tokens_TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
            return (self.norm(tokens_TD) if norm else tokens_TD).view(sequences.count, grid.num_patches, -1)

        tokens = self._before(images_BCHW, [number + 1 for number in self._numbers(blocks)], output)
        return [tokens_BND.unflatten(1, grid.shape) for tokens_BND in tokens] if maps else tokens

    def attention_weights(self, images_BCHW: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Attention weights of chosen blocks, in the order asked for: each (B, H, N, N), rows attend to columns.

        images_BCHW, blocks, errors: as of intermediate(). In fp32 (fp64 of an fp64 model). They are computed for this
        alone, from weights held whole, as attention itself never holds them: H * N * N numbers an image and block.
        """

        def weights(block: int, tokens_TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
            chosen: Any = self.blocks[block]
            return chosen.attention_weights(tokens_TD, sequences)

        return self._before(images_BCHW, self._numbers(blocks), weights)

    def _numbers(self, blocks: Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        if not len(blocks) or not all(-depth <= block < depth for block in blocks):
            raise ValueError(f"blocks must be one or more of {-depth}..{depth - 1}, got {list(blocks)}")
        return [block % depth for block in blocks]

    def _before(
        self, images_BCHW: torch.Tensor, blocks: list[int], look: Callable[[int, torch.Tensor, Sequences], torch.Tensor]
    ) -> list[torch.Tensor]:
        """look(block, what goes into it (T, D), its sequences) for each of blocks; block `depth` is past the last."""
        parts = []
        for images in images_BCHW.split(self._images_at_once(images_BCHW)):
            tokens_TD, sequences = self._embed(images)
            found = {}
            for block in range(max(blocks) + 1):
                if block:  # which writes over nothing: what was looked at stays
                    tokens_TD = run_block(self.blocks[block - 1], tokens_TD, sequences)
                if block in blocks:
                    found[block] = look(block, tokens_TD, sequences)
            parts.append([found[block] for block in blocks])
        return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    def _images_at_once(self, images_BCHW: torch.Tensor) -> int:
        batch = max(1, images_BCHW.shape[0])
        if images_BCHW.device.type == "cpu" and not torch.is_grad_enabled():
            return min(batch, max(1, CPU_TOKENS // self.grid_of(images_BCHW).num_patches))
        return batch

    def _embed(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, Sequences]:
        """All patches of whole images with their positions, (B * N, D), a sequence an image."""
        batch, grid = images_BCHW.shape[0], self.grid_of(images_BCHW)
        return self._placed(self.patch_embed(images_BCHW, None, self.dtype), batch, grid)

    def _placed(self, tokens_TD: torch.Tensor, images: int, grid: PatchGrid) -> tuple[torch.Tensor, Sequences]:
        starts = torch.arange(images + 1, device=tokens_TD.device, dtype=torch.int32) * grid.num_patches
        positions_1ND = resized_pos_embed(self.pos_embed, self.grid, grid).to(self.dtype)
        tokens_TD = (tokens_TD.view(images, grid.num_patches, -1) + positions_1ND).flatten(0, 1)
        return tokens_TD, Sequences(starts, grid.num_patches, images * grid.num_patches)

    def of_pixels(self, pixels_BNK: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """What some blocks put out, (B, N, D) of each without the final LayerNorm, of images of the model's own size.

        pixels_BNK: (B, N, K) normalized pixels of all patches, as patchify() gives them and in any float dtype: unlike
        to images, gradients flow to these. layers: blocks, counted from 1, ascending; later ones are not run.
        """
        images, patches, _ = pixels_BNK.shape
        tokens_TD = self.patch_embed.proj(pixels_BNK.to(self.dtype).flatten(0, 1))
        tokens_TD, sequences = self._placed(tokens_TD, images, self.grid)
        rows = torch.arange(images * patches, device=pixels_BNK.device)
        return [
            one.unflatten(0, (images, patches)) for one in rows_after(self.blocks, tokens_TD, sequences, rows, layers)
        ]


def _rows_between(rows_K: torch.Tensor | None, image: int, images: int, num_patches: int) -> torch.Tensor | None:
    """Of ascending rows of all images' tokens those of images image .. image + images - 1, counted from the first."""
    if rows_K is None:
        return None
    low, high = image * num_patches, (image + images) * num_patches
    return rows_K[(rows_K >= low) & (rows_K < high)] - low
