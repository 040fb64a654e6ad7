"""Rows of a token matrix by packed indices."""

import torch


def gather_rows(tokens_TD: torch.Tensor, indices_K: torch.Tensor) -> torch.Tensor:
    """tokens_TD[indices_K]: (T, D) tokens, (K,) integer rows, repeated ones allowed -> (K, D)."""
    return tokens_TD.index_select(0, indices_K)
