"""The vision transformer on packed tokens, and its table of sizes. B images, N patches, T packed tokens, D width."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from ijepa_kernels.gather import gather_rows
from ijepa_kernels.patchify import patchify
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.packing import Packed
from ijepa_scale.models.attention import Attend, Sequences, attention_weights, packed_attention
from ijepa_scale.models.positions import resized_pos_embed, sincos_pos_embed


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    width: int
    depth: int
    heads: int
    mlp_width: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.mlp_width) < 1 or self.width % self.heads or self.width % 4:
            raise ValueError(
                f"a transformer's sizes must be positive and its width a multiple of its heads and of 4, got {self}"
            )


VIT_SIZES = {
    "vit_tiny": ViTSize(width=192, depth=12, heads=3, mlp_width=768),
    "vit_small": ViTSize(width=384, depth=12, heads=6, mlp_width=1536),
    "vit_base": ViTSize(width=768, depth=12, heads=12, mlp_width=3072),
    "vit_large": ViTSize(width=1024, depth=24, heads=16, mlp_width=4096),
    "vit_huge": ViTSize(width=1280, depth=32, heads=16, mlp_width=5120),
    "vit_giant": ViTSize(width=1408, depth=40, heads=16, mlp_width=6144),  # "ViT-g"; the paper's table calls it G/16
    "vit_gigantic": ViTSize(width=1664, depth=48, heads=16, mlp_width=8192),  # ViT-G
}


NORM_EPS = 1e-6  # as in public checkpoints; PyTorch's 1e-5 shifts features

# Where no gradient is kept, a CPU encodes about so many tokens at a time: what passes from one operation to the next
# then stays in its caches. Measured in docs/lab/speed.md.
CPU_TOKENS = 4096

Affine = tuple[torch.Tensor, torch.Tensor]  # weight and bias of a linear layer or a LayerNorm


def _residual_linear(
    x_TK: torch.Tensor, weight_DK: torch.Tensor, bias_D: torch.Tensor, residual_TD: torch.Tensor, overwrite: bool
) -> torch.Tensor:
    """x @ weight.T + bias + residual: the product is accumulated onto the sum of the others, in one pass.

    overwrite: where no gradient is kept the sum takes the residual's place in memory, unless it awaits one (it is a
    block's input that will be computed again).
    """
    # torch.compile fuses the sum with what follows; a product onto it would copy it first. Under autocast the product
    # is of a lower precision than what it is added to.
    if torch.compiler.is_compiling() or not x_TK.dtype == weight_DK.dtype == residual_TD.dtype:
        return F.linear(x_TK, weight_DK, bias_D) + residual_TD
    kept = not overwrite or torch.is_grad_enabled() or residual_TD.requires_grad
    return (residual_TD + bias_D if kept else residual_TD.add_(bias_D)).addmm_(x_TK, weight_DK.t())


# The two halves of a block around its attention are functions of tensors alone: all blocks share what torch.compile
# makes of them, and hooks on modules (ZeRO-3's) break no graph.


def _before_attention(tokens_TD: torch.Tensor, norm: Affine, qkv: Affine) -> torch.Tensor:
    """LayerNorm and the projection to queries, keys and values, (T, 3 * D)."""
    return F.linear(F.layer_norm(tokens_TD, tokens_TD.shape[-1:], *norm, NORM_EPS), *qkv)


def _after_attention(
    mixed_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    proj: Affine,
    norm: Affine,
    fc1: Affine,
    fc2: Affine,
    overwrite: bool = False,
) -> torch.Tensor:
    """The projection, LayerNorm and the MLP, each half added to what it came from, (T, D).

    overwrite: the result may take the place of residual_TD.
    """
    tokens_TD = _residual_linear(mixed_TD, *proj, residual_TD, overwrite)
    hidden_TK = F.gelu(F.linear(F.layer_norm(tokens_TD, tokens_TD.shape[-1:], *norm, NORM_EPS), *fc1))
    return _residual_linear(hidden_TK, *fc2, tokens_TD, overwrite=True)  # which nobody else holds


@cache
def _compiled_halves() -> tuple[Callable, Callable]:
    """Raises torch's FailOnRecompileLimitHit where it would otherwise go on uncompiled with one line in a log."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(_before_attention), torch.compile(_after_attention)


class Attention(nn.Module):
    """The weights of attention, named as in public checkpoints."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Mlp(nn.Module):
    """The weights of the MLP, named as in public checkpoints."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)


def _affine(layer: nn.Linear | nn.LayerNorm) -> Affine:
    return layer.weight, layer.bias


class Block(nn.Module):
    """A pre-norm transformer block on packed tokens.

    compiled: its two halves run through torch.compile. recomputed: its backward runs its forward again (activation
    checkpointing), and only its input is kept. engine_hooks: forward hooks that keep nothing of what they are given, as
    DeepSpeed's under ZeRO-3.
    """

    compiled = False
    recomputed = False
    engine_hooks = 0

    def __init__(self, size: ViTSize):
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.attn = Attention(size.width, size.heads)
        self.norm2 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.mlp = Mlp(size.width, size.mlp_width)

    def forward(
        self,
        tokens_TD: torch.Tensor,
        sequences: Sequences,
        rows_K: torch.Tensor | None = None,
        *,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """The block's output, (T, D), or its rows (K, D).

        rows_K: (K,) integers, the rows wanted, each once; all attend, what follows is computed for these alone.
        overwrite: where no gradient is kept the result may be written over tokens_TD.
        """
        layers = (self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)
        proj, norm2, fc1, fc2 = (_affine(layer) for layer in layers)
        mixed_TD = packed_attention(self._qkv(tokens_TD), sequences).flatten(1)
        if rows_K is not None:
            mixed_TD, tokens_TD = (gather_rows(rows, rows_K, unique=True) for rows in (mixed_TD, tokens_TD))
        if self.compiled:
            _, after = _compiled_halves()
            return after(self._any_length(mixed_TD), self._any_length(tokens_TD), proj, norm2, fc1, fc2)
        return _after_attention(mixed_TD, tokens_TD, proj, norm2, fc1, fc2, overwrite or rows_K is not None)

    def attention_weights(self, tokens_TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """How much each token attends to each other of its sequence, (S, H, L, L): see attention.attention_weights."""
        return attention_weights(self._qkv(tokens_TD), sequences)

    def _qkv(self, tokens_TD: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values, (T, 3, H, E)."""
        before = _compiled_halves()[0] if self.compiled else _before_attention
        qkv_TF = before(self._any_length(tokens_TD), _affine(self.norm1), _affine(self.attn.qkv))
        return qkv_TF.unflatten(-1, (3, self.attn.heads, -1))

    def _any_length(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """The same; compiled code then takes any number of rows, and no batch compiles it again."""
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(rows_TD, 0)
        return rows_TD


def recompute(blocks: nn.ModuleList, every: int) -> None:
    """Activation checkpointing of every Nth block, N = every; 0: of none."""
    block: Any
    for i, block in enumerate(blocks, 1):
        block.recomputed = every > 0 and i % every == 0


def count_recomputed(depth: int, every: int) -> int:
    """How many of so many blocks recompute() takes."""
    return depth // every if every else 0


def bytes_kept(size: ViTSize, every: int, itemsize: int) -> int:
    """Bytes a token that blocks keep for the backward, every Nth of them recomputed (0: none), not compiled.

    A block keeps both LayerNorms' outputs and statistics, q, k, v, the attention's output and its normalizer of each
    head, the sum after it, the MLP's hidden layer before and after GELU, and its output; recomputed, its output alone.
    itemsize: bytes of a value.
    """
    whole = (8 * size.width + 2 * size.mlp_width + 4) * itemsize + 4 * size.heads
    recomputed = count_recomputed(size.depth, every)
    return (size.depth - recomputed) * whole + recomputed * size.width * itemsize


def run_blocks(
    blocks: nn.ModuleList, tokens_TD: torch.Tensor, sequences: Sequences, rows_K: torch.Tensor | None = None
) -> torch.Tensor:
    """All blocks in turn; where no gradient is kept they may write over tokens_TD, unless hooks look at them.

    rows_K: (K,) integers, rows of the result, each once; None: all.
    """
    overwrite = not _hooked(blocks)
    for i, block in enumerate(blocks, 1):
        tokens_TD = _run_block(block, tokens_TD, sequences, rows_K if i == len(blocks) else None, overwrite=overwrite)
    return tokens_TD


def _run_block(
    block: Any,
    tokens_TD: torch.Tensor,
    sequences: Sequences,
    rows_K: torch.Tensor | None = None,
    *,
    overwrite: bool = False,
) -> torch.Tensor:
    """As block(), but computed again in the backward where it is to be."""
    if block.recomputed and torch.is_grad_enabled():
        # No block draws random numbers, and to save a GPU's generator is to wait for it.
        return checkpoint(block, tokens_TD, sequences, rows_K, use_reentrant=False, preserve_rng_state=False)
    return block(tokens_TD, sequences, rows_K, overwrite=overwrite)


def _hooked(blocks: Iterable[Any]) -> bool:
    """Whether forward hooks are given what goes in or comes out of a block, and may keep it."""
    watched = (len(block._forward_hooks) + len(block._forward_pre_hooks) > block.engine_hooks for block in blocks)
    return _has_any_global_hook() or any(watched)


class PatchProjection(nn.Conv2d):
    """The patch embedding's weights as public checkpoints hold them, (D, 3, p, p), applied to rows of pixels."""

    def forward(self, pixels_TK: torch.Tensor) -> torch.Tensor:
        return F.linear(pixels_TK, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: torch.Tensor, indices_T: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return self.proj(patchify(images_BCHW, self.patch_size, indices_T=indices_T, dtype=dtype))


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
        return self.norm.weight.dtype

    def grid_of(self, images_BCHW: torch.Tensor) -> PatchGrid:
        """The patch grid of such images. ValueError for sides that are not multiples of the patch."""
        return PatchGrid.of_image(images_BCHW.shape[-2], images_BCHW.shape[-1], self.patch_embed.patch_size)

    def forward(
        self, images_BCHW: torch.Tensor, packed: Packed | None = None, rows_K: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode the tokens named by packed, or all of them.

        images_BCHW: (B, 3, H, W) uint8, of the model's image size where packed is given, else of any whose sides are
        multiples of the patch. rows_K: (K,) integers in ascending order, the rows wanted of the tokens.
        Returns (K, D) where rows are given, else (T, D) for packed tokens, else (B, N, D).
        Raises ValueError for images of another size.
        """
        batch, grid = images_BCHW.shape[0], self.grid_of(images_BCHW)
        if packed is not None:
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
        part, encoded = self._images_at_once(images_BCHW), []
        for start in range(0, batch, part):
            tokens_TD, sequences = self._embed(images_BCHW[start : start + part])
            # All at once: the rows are not looked at, which on a device would be waited for.
            rows = rows_K if part >= batch else _rows_between(rows_K, start, part, grid.num_patches)
            encoded.append(self.norm(run_blocks(self.blocks, tokens_TD, sequences, rows)))
        tokens_TD = encoded[0] if len(encoded) == 1 else torch.cat(encoded)
        return tokens_TD if rows_K is not None else tokens_TD.view(batch, grid.num_patches, -1)

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
                    tokens_TD = _run_block(self.blocks[block - 1], tokens_TD, sequences)
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
        starts = torch.arange(batch + 1, device=images_BCHW.device, dtype=torch.int32) * grid.num_patches
        tokens_TD = self.patch_embed(images_BCHW, None, self.dtype)
        positions_1ND = resized_pos_embed(self.pos_embed, self.grid, grid).to(self.dtype)
        tokens_TD = (tokens_TD.view(batch, grid.num_patches, -1) + positions_1ND).flatten(0, 1)
        return tokens_TD, Sequences(starts, grid.num_patches, batch * grid.num_patches)


def _rows_between(rows_K: torch.Tensor | None, image: int, images: int, num_patches: int) -> torch.Tensor | None:
    """Of ascending rows of all images' tokens those of images image .. image + images - 1, counted from the first."""
    if rows_K is None:
        return None
    low, high = image * num_patches, (image + images) * num_patches
    return rows_K[(rows_K >= low) & (rows_K < high)] - low
