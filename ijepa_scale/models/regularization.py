"""Terms that keep features from collapsing. B images, T packed tokens, D width."""

import torch
import torch.nn.functional as F

from ijepa_scale.masking.packing import Packed

STD_TARGET = 1.0  # the hinge of the variance term; tokens leave the encoder's LayerNorm with a root mean square of 1
VARIANCE_EPS = 1e-4  # under the square root, whose gradient is infinite at 0


def pooled_tokens(tokens_TD: torch.Tensor, packed: Packed) -> torch.Tensor:
    """The mean of each packed sequence's tokens, (S, D) in fp32 (fp64 for fp64 input)."""
    compute = torch.float64 if tokens_TD.dtype == torch.float64 else torch.float32
    lengths = packed.cu_seqlens.diff().long()
    # unsafe: the check that lengths add up to T would wait for the device.
    return torch.segment_reduce(tokens_TD.to(compute), "mean", lengths=lengths, axis=0, unsafe=True)


def variance_covariance(pooled_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The variance and covariance terms of VICReg (arXiv:2105.04906, section 4.1), two scalars.

    pooled_BD: (B, D), one feature an image, B >= 2, fp32 or fp64. Variance: how far each dimension's standard deviation
    over the images falls short of 1, averaged over the dimensions: 1 when all images are alike. Covariance: the squared
    covariances between dimensions, summed and divided by D.
    """
    centered_BD = pooled_BD - pooled_BD.mean(dim=0)
    covariance_DD = centered_BD.T @ centered_BD / (len(pooled_BD) - 1)
    variances_D = covariance_DD.diagonal()
    variance = F.relu(STD_TARGET - (variances_D + VARIANCE_EPS).sqrt()).mean()
    covariance = (covariance_DD.square().sum() - variances_D.square().sum()) / len(variances_D)
    return variance, covariance
