"""A transformer's blocks on packed tokens: T tokens in S sequences, D width, H heads, K rows of the tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from ijepa_kernels.bias_gelu import bias_gelu
from ijepa_kernels.dispatch import use_kernels
from ijepa_kernels.gather import gather_rows
from ijepa_kernels.linear_gelu import linear_gelu
from ijepa_kernels.norm_residual import norm_residual
from ijepa_scale.models.attention import Sequences, attention_weights, packed_attention

NORM_EPS = 1e-6  # as in public checkpoints; PyTorch's 1e-5 shifts features

Affine = tuple[torch.Tensor, torch.Tensor]  # weight and bias of a linear layer or a LayerNorm


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    width: int
    depth: int
    heads: int
    mlp_width: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.mlp_width) < 1 or self.width % self.heads or self.width % 4:
            raise ValueError(
                "a transformer's sizes must be positive and its width a multiple of its heads and of 4, got width "
                f"{self.width}, depth {self.depth}, heads {self.heads}, mlp_width {self.mlp_width}"
            )


def _residual_linear(
    x_TK: torch.Tensor,
    weight_DK: torch.Tensor,
    bias_D: torch.Tensor,
    residual_TD: torch.Tensor,
    overwrite: bool,
    keep_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias + residual: the product is accumulated onto the sum of the others, in one pass.

    overwrite: where no gradient is kept the sum takes the residual's place in memory, unless it awaits one (it is a
    block's input that will be computed again). keep_T: factors of all that is added to the residual.
    """
    if keep_T is not None:
        return torch.addcmul(residual_TD, F.linear(x_TK, weight_DK, bias_D), keep_T[:, None])
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
    keep_T2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The projection, LayerNorm and the MLP, each half added to what it came from, (T, D).

    overwrite: the result may take the place of residual_TD. keep_T2: as of Block.forward().
    """
    keep_attention_T, keep_mlp_T = (None, None) if keep_T2 is None else keep_T2.unbind(1)
    tokens_TD = _residual_linear(mixed_TD, *proj, residual_TD, overwrite, keep_attention_T)
    hidden_TK = F.gelu(F.linear(F.layer_norm(tokens_TD, tokens_TD.shape[-1:], *norm, NORM_EPS), *fc1))
    return _residual_linear(hidden_TK, *fc2, tokens_TD, True, keep_mlp_T)  # overwritten: nobody else holds them


# Where kernels run, a LayerNorm and the sum of the residual and the next bias are one pass, each way. Each half of a
# block then is such a pass, a product of the normalized tokens, what follows, and a product onto the sum.


def _norm_linear(
    linear: Callable,
    weights: Affine,
    tokens_TD: torch.Tensor,
    norm: Affine,
    bias_D: torch.Tensor,
    overwrite: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear(normalized tokens, *weights), and tokens + bias, which may take the tokens' place."""
    normalized_TD, sum_TD = norm_residual(tokens_TD, *norm, bias_D, NORM_EPS, overwrite=overwrite)
    return linear(normalized_TD, *weights), sum_TD


def _biased_gelu(x_TD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor) -> torch.Tensor:
    return bias_gelu(F.linear(x_TD, weight_KD), bias_K)


def _onto(sum_TD: torch.Tensor, x_TK: torch.Tensor, weight_DK: torch.Tensor) -> torch.Tensor:
    """sum + x @ weight.T, in the sum's place but under autocast, where the product is of a lower precision."""
    if x_TK.dtype == weight_DK.dtype == sum_TD.dtype:
        return sum_TD.addmm_(x_TK, weight_DK.t())
    return F.linear(x_TK, weight_DK) + sum_TD


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
    fused_gelu = False  # where kernels run and no gradient is kept: off, at 77% of the product (docs/kernels.md)
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
        keep_T2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block's output, (T, D), or its rows (K, D).

        rows_K: (K,) integers, the rows wanted, each once; all attend, what follows is computed for these alone.
        overwrite: where no gradient is kept the result may be written over tokens_TD.
        keep_T2: (T, 2), factors of what the attention and the MLP add to each token, of drop path.
        """
        one_type = tokens_TD.dtype == self.norm1.weight.dtype
        if keep_T2 is None and one_type and not self.compiled and use_kernels(tokens_TD):
            return self._forward_in_kernels(tokens_TD, sequences, rows_K, overwrite)
        layers = (self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)
        proj, norm2, fc1, fc2 = (_affine(layer) for layer in layers)
        mixed_TD = packed_attention(self._qkv(tokens_TD), sequences).flatten(1)
        if rows_K is not None:
            mixed_TD, tokens_TD = (gather_rows(rows, rows_K) for rows in (mixed_TD, tokens_TD))
            keep_T2 = None if keep_T2 is None else keep_T2[rows_K]
        if self.compiled:
            _, after = _compiled_halves()
            keep_T2 = None if keep_T2 is None else self._any_length(keep_T2)
            return after(self._any_length(mixed_TD), self._any_length(tokens_TD), proj, norm2, fc1, fc2, False, keep_T2)
        return _after_attention(mixed_TD, tokens_TD, proj, norm2, fc1, fc2, overwrite or rows_K is not None, keep_T2)

    def _forward_in_kernels(
        self, tokens_TD: torch.Tensor, sequences: Sequences, rows_K: torch.Tensor | None, overwrite: bool
    ) -> torch.Tensor:
        proj, fc1, fc2 = (_affine(layer) for layer in (self.attn.proj, self.mlp.fc1, self.mlp.fc2))
        norm1, norm2, qkv = (_affine(layer) for layer in (self.norm1, self.norm2, self.attn.qkv))
        qkv_TF, sum_TD = _norm_linear(F.linear, qkv, tokens_TD, norm1, proj[1], overwrite)
        mixed_TD = packed_attention(self._heads(qkv_TF), sequences).flatten(1)
        del qkv_TF
        if rows_K is not None:
            mixed_TD, sum_TD = (gather_rows(rows, rows_K) for rows in (mixed_TD, sum_TD))
        tokens_TD = _onto(sum_TD, mixed_TD, proj[0])
        hidden = _biased_gelu if torch.is_grad_enabled() else partial(linear_gelu, fused=self.fused_gelu)
        hidden_TK, sum_TD = _norm_linear(hidden, fc1, tokens_TD, norm2, fc2[1], True)
        return _onto(sum_TD, hidden_TK, fc2[0])

    def attention_weights(self, tokens_TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """How much each token attends to each other of its sequence, (S, H, L, L): see attention.attention_weights."""
        return attention_weights(self._qkv(tokens_TD), sequences)

    def _qkv(self, tokens_TD: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values, (T, 3, H, E)."""
        before = _compiled_halves()[0] if self.compiled else _before_attention
        qkv_TF = before(self._any_length(tokens_TD), _affine(self.norm1), _affine(self.attn.qkv))
        return self._heads(qkv_TF)

    def _heads(self, qkv_TF: torch.Tensor) -> torch.Tensor:
        return qkv_TF.unflatten(-1, (3, self.attn.heads, -1))

    def _any_length(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """The same; compiled code then takes any number of rows, and no batch compiles it again."""
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(rows_TD, 0)
        return rows_TD


class CrossBlock(Block):
    """A block whose tokens attend to others as well, which stay as they are (CAE, arXiv:2202.03026, section 3.2).

    B images, V tokens seen and M hidden ones of each. Its weights are a Block's. It runs as it is, whatever compiled.
    """

    def forward(  # type: ignore[override]
        self, hidden_BMD: torch.Tensor, seen_BVD: torch.Tensor, positions_BND: torch.Tensor
    ) -> torch.Tensor:
        """The hidden tokens attend to those seen and to one another, (B, M, D).

        positions_BND: embeddings of the seen, then of the hidden ones, (B, V + M, D). They are part of queries and
        keys, after the LayerNorm, and not of values.
        """
        tokens_BND = torch.cat([seen_BVD, hidden_BMD], dim=1)
        values_BND = F.layer_norm(tokens_BND, tokens_BND.shape[-1:], *_affine(self.norm1), NORM_EPS)
        keys_BND = values_BND + positions_BND
        inputs = (keys_BND[:, seen_BVD.shape[1] :], keys_BND, values_BND)
        weights, biases = (part.chunk(3) for part in _affine(self.attn.qkv))
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        mixed_BMD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        layers = (self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)
        proj, norm2, fc1, fc2 = (_affine(layer) for layer in layers)
        mixed_TD, hidden_TD = mixed_BMD.flatten(0, 1), hidden_BMD.flatten(0, 1)
        return _after_attention(mixed_TD, hidden_TD, proj, norm2, fc1, fc2).view_as(hidden_BMD)


def run_cross_block(
    block: Any, hidden_BMD: torch.Tensor, seen_BVD: torch.Tensor, positions_BND: torch.Tensor
) -> torch.Tensor:
    """As CrossBlock, but computed again in the backward where it is to be."""
    if block.recomputed and torch.is_grad_enabled():
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}  # as of run_block()
        return checkpoint(block, hidden_BMD, seen_BVD, positions_BND, **options)
    return block(hidden_BMD, seen_BVD, positions_BND)


def recompute(blocks: nn.ModuleList, every: int) -> None:
    """Activation checkpointing of every Nth block, N = every; 0: of none."""
    block: Any
    for i, block in enumerate(blocks, 1):
        block.recomputed = every > 0 and i % every == 0


def set_compiled(network: nn.Module, compiled: bool) -> None:
    """Whether its blocks run through torch.compile."""
    for block in network.modules():
        if isinstance(block, Block):
            block.compiled = compiled


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


def bytes_kept_in_all(size: ViTSize, every: int, itemsize: int, *, tokens: float, rows: float | None = None) -> float:
    """Bytes that a network of such blocks keeps of so many tokens: the first block's input, and all that blocks keep.

    And the output of the LayerNorm that follows, which the next layer keeps. rows: of the last block's output, where
    not all are wanted. every, itemsize: as of bytes_kept().
    """
    width, rows = size.width * itemsize, tokens if rows is None else rows
    kept = tokens * (width + bytes_kept(size, every, itemsize)) + rows * (width + 2 * itemsize)
    if rows == tokens:
        return kept
    if every and size.depth % every == 0:
        return kept - (tokens - rows) * width
    # Of others the last block keeps what its attention does; rows are kept once more, as they are gathered.
    return kept - (tokens - rows) * (3 * width + 2 * (size.mlp_width + 1) * itemsize) + rows * width


def run_blocks(
    blocks: nn.ModuleList,
    tokens_TD: torch.Tensor,
    sequences: Sequences,
    rows_K: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """All blocks in turn; where no gradient is kept they may write over tokens_TD, unless hooks look at them.

    rows_K: (K,) integers, rows of the result, each once; None: all. keep: (blocks, S, 2), for each sequence the factors
    of what a block's attention and MLP add to its tokens, of drop path (stochastic depth, arXiv:1603.09382); None: 1.
    """
    overwrite = not _hooked(blocks)
    if keep is not None:
        lengths = sequences.cu_seqlens.diff()
        keep = keep.to(tokens_TD.dtype).repeat_interleave(lengths, dim=1, output_size=sequences.num_tokens)
    for i, block in enumerate(blocks, 1):
        rows, keep_T2 = rows_K if i == len(blocks) else None, None if keep is None else keep[i - 1]
        tokens_TD = run_block(block, tokens_TD, sequences, rows, overwrite=overwrite, keep_T2=keep_T2)
    return tokens_TD


def rows_after(
    blocks: nn.ModuleList, tokens_TD: torch.Tensor, sequences: Sequences, rows_K: torch.Tensor, layers: Sequence[int]
) -> list[torch.Tensor]:
    """Rows of what chosen blocks put out, (K, D) of each; later blocks are not run.

    rows_K: as of run_blocks(), which may write over tokens_TD likewise: what is wanted of a block is copied before the
    next one runs. layers: numbers of blocks, counted from 1, in ascending order.
    """
    overwrite, found = not _hooked(blocks), []
    for number, block in enumerate(islice(blocks, layers[-1]), 1):
        last = number == layers[-1]
        tokens_TD = run_block(block, tokens_TD, sequences, rows_K if last else None, overwrite=overwrite)
        if number in layers:
            found.append(tokens_TD if last else gather_rows(tokens_TD, rows_K))
    return found


def run_block(
    block: Any,
    tokens_TD: torch.Tensor,
    sequences: Sequences,
    rows_K: torch.Tensor | None = None,
    *,
    overwrite: bool = False,
    keep_T2: torch.Tensor | None = None,
) -> torch.Tensor:
    """As block(), but computed again in the backward where it is to be."""
    if block.recomputed and torch.is_grad_enabled():
        # No block draws random numbers, and to save a GPU's generator is to wait for it.
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(block, tokens_TD, sequences, rows_K, keep_T2=keep_T2, **options)
    return block(tokens_TD, sequences, rows_K, overwrite=overwrite, keep_T2=keep_T2)


def _hooked(blocks: Iterable[Any]) -> bool:
    """Whether forward hooks are given what goes in or comes out of a block, and may keep it."""
    watched = (len(block._forward_hooks) + len(block._forward_pre_hooks) > block.engine_hooks for block in blocks)
    return _has_any_global_hook() or any(watched)
