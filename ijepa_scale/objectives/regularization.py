"""Terms that keep features from collapsing. T packed tokens, D width, N patches an image."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

STD_TARGET = 1.0  # the hinge of the variance term; tokens leave the encoder's LayerNorm with a root mean square of 1
VARIANCE_EPS = 1e-4  # under the square root, whose gradient is infinite at 0


def of_one_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors where there is one rank."""
    return tensor


def variance_covariance(
    tokens_TD: torch.Tensor, patches_T: torch.Tensor, num_patches: int, total: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The variance and covariance terms of VICReg (arXiv:2105.04906, section 4.1) on tokens, two scalars.

    Each token less the mean of all tokens at its patch: what is left cannot come from the position embedding, which is
    all that a collapsed encoder puts out. Variance: how far each dimension's standard deviation falls short of 1,
    averaged over the dimensions: 1 when all images are alike. Covariance: the squared covariances between dimensions,
    summed and divided by D.

    tokens_TD: (T, D) of many images, any float dtype. patches_T: (T,) integers, the patch of each. total: the sum of
    this rank's tensor and those of all other ranks, with gradients. Computed in fp32, fp64 for fp64 input.
    """
    device = tokens_TD.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        tokens_TD = tokens_TD.to(torch.float64 if tokens_TD.dtype == torch.float64 else torch.float32)
        # Sums by a product with ones and zeros: index_add's order, and so its rounding, is open on CUDA.
        at_patch_TN = F.one_hot(patches_T.long(), num_patches).to(tokens_TD.dtype)
        counts_N1 = total(at_patch_TN.sum(dim=0))[:, None]
        # No gradient passes through the means: the sums of squares about them are at their least there.
        means_ND = total(at_patch_TN.T @ tokens_TD.detach()) / counts_N1.clamp(min=1)
        centered_TD = tokens_TD - at_patch_TN @ means_ND
        covariance_DD = total(centered_TD.T @ centered_TD) / (counts_N1.sum() - 1)
        variances_D = covariance_DD.diagonal()
        variance = F.relu(STD_TARGET - (variances_D + VARIANCE_EPS).sqrt()).mean()
        covariance = (covariance_DD.square().sum() - variances_D.square().sum()) / len(variances_D)
    return variance, covariance
