"""Attention over packed tokens. T packed tokens, S sequences, L the longest, H heads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sequences:
    """Where packed sequences begin: cu_seqlens, (S + 1,) int32 on the tokens' device. Lengths are on the host.

    Every token is in a sequence: num_tokens is cu_seqlens[-1], and padding is a sequence of its own, the last. Kernels
    leave what lies past it as it was in memory, often NaN (pytorch/pytorch#176793, #188933).
    attend: the kernel that packed_attention() calls; None: PyTorch's scaled_dot_product_attention.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_tokens: int
    attend: "Attend | None" = None

    @property
    def count(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def equal_lengths(self) -> bool:
        return self.num_tokens == self.count * self.max_seqlen

    @cached_property
    def by_length(self) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """The tokens with sequences of one length side by side: their rows (T,), the inverse, [(sequences, length)].

        Waits for a device's cu_seqlens; computed once, used by every block.
        """
        lengths, order = self.cu_seqlens.diff().long().sort(stable=True)
        shifts = self.cu_seqlens[:-1].long()[order] - (lengths.cumsum(0) - lengths)
        places = torch.arange(self.num_tokens, device=lengths.device)
        rows = places + shifts.repeat_interleave(lengths, output_size=self.num_tokens)
        distinct, counts = lengths.unique_consecutive(return_counts=True)
        return rows, rows.argsort(), list(zip(counts.tolist(), distinct.tolist(), strict=True))

    @cached_property
    def padded_rows_T(self) -> torch.Tensor:
        """(T,) int64: the row of each token in an (S * L) padded layout. Computed once, used by every block."""
        lengths = self.cu_seqlens.diff()
        rows = torch.arange(self.num_tokens, device=lengths.device)
        starts = torch.arange(self.count, device=lengths.device) * self.max_seqlen - self.cu_seqlens[:-1]
        return rows + starts.repeat_interleave(lengths, output_size=self.num_tokens)

    @cached_property
    def key_mask_S11L(self) -> torch.Tensor:
        """(S, 1, 1, L) bool: true where a padded row holds a token."""
        columns = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return (columns < self.cu_seqlens.diff()[:, None])[:, None, None, :]


Attend = Callable[[torch.Tensor, Sequences], torch.Tensor]  # as packed_attention()


def packed_attention(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Softmax attention within each packed sequence, none across.

    qkv_T3HE: (T, 3, H, E). Returns (T, H, E). Without a kernel (attention_backends.py) sequences of one length run as
    a dense batch. Others: on a CPU, those of each length as a dense batch of their own; elsewhere, where lengths are
    not to be fetched from the device, padded to the longest and masked.
    """
    if sequences.attend is not None:
        return sequences.attend(_aligned(qkv_T3HE), sequences)
    if sequences.equal_lengths:
        return _dense_attention(qkv_T3HE, sequences.count, sequences.max_seqlen)
    if qkv_T3HE.device.type == "cpu":
        return _grouped_attention(qkv_T3HE, sequences)
    return _padded_attention(qkv_T3HE, sequences)


def _aligned(qkv_T3HE: torch.Tensor) -> torch.Tensor:
    """Rows end to end, from a multiple of 16 bytes on: elsewhere kernels may be silently wrong (pytorch#194818)."""
    if qkv_T3HE.is_contiguous() and qkv_T3HE.storage_offset() * qkv_T3HE.element_size() % 16 == 0:
        return qkv_T3HE
    return qkv_T3HE.clone(memory_format=torch.contiguous_format)


def _dense_attention(qkv_T3HE: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """count sequences of one length."""
    tokens, _, heads, width = qkv_T3HE.shape
    # unbind's gradient is one stack in the layout of qkv; that of a permuted view's parts would be copied once more
    q, k, v = (part.view(count, length, heads, width).transpose(1, 2) for part in qkv_T3HE.unbind(1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens, heads, width)


def _grouped_attention(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    rows_T, inverse_T, groups = sequences.by_length
    parts = qkv_T3HE.index_select(0, rows_T).split([count * length for count, length in groups])
    outputs = [_dense_attention(part, *group) for part, group in zip(parts, groups, strict=True)]
    return torch.cat(outputs).index_select(0, inverse_T)


def _padded_attention(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    _, _, heads, width = qkv_T3HE.shape
    shape = (sequences.count, sequences.max_seqlen, 3, heads, width)
    rows = sequences.padded_rows_T
    padded = qkv_T3HE.new_zeros((shape[0] * shape[1], 3, heads, width)).index_copy(0, rows, qkv_T3HE)
    q, k, v = padded.view(shape).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sequences.key_mask_S11L)
    return out.transpose(1, 2).reshape(-1, heads, width).index_select(0, rows)


def attention_weights(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """The softmax that packed_attention() weighs values with, (S, H, L, L), for sequences of one length L.

    qkv_T3HE: (T, 3, H, E). Row i of a sequence's matrix is what its token i attends to; it sums to 1. In fp32, or fp64
    for fp64 input.
    """
    assert sequences.equal_lengths
    q, k, _ = qkv_T3HE.unflatten(0, (sequences.count, sequences.max_seqlen)).permute(2, 0, 3, 1, 4)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1, dtype=dtype)


def packed_attention_reference(qkv_T3HE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """The definition, one sequence at a time."""
    bounds = sequences.cu_seqlens.tolist()
    outputs = []
    for start, stop in pairwise(bounds):
        q, k, v = qkv_T3HE[start:stop].permute(1, 2, 0, 3)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)
