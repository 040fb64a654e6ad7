"""The predictor's packed input. T tokens of context, T_p rows of the predictor, P its width, N patches an image."""

import torch


def assemble(
    context_TP: torch.Tensor,
    mask_token_P: torch.Tensor,
    pos_embed_NP: torch.Tensor,
    source_T: torch.Tensor,
    indices_T: torch.Tensor,
) -> torch.Tensor:
    """Context tokens and mask tokens, each with the position embedding of its patch (arXiv:2301.08243, section 3).

    context_TP: (T, P). source_T: (T_p,) integers, a row of context_TP, or -1 for the mask token.
    indices_T: (T_p,) integers, image * N + patch. Returns (T_p, P) in the dtype of context_TP.
    """
    rows_TP = context_TP.index_select(0, source_T.clamp(min=0))
    rows_TP = torch.where((source_T < 0)[:, None], mask_token_P.to(rows_TP.dtype), rows_TP)
    return rows_TP + pos_embed_NP.to(rows_TP.dtype).index_select(0, indices_T % pos_embed_NP.shape[0])
