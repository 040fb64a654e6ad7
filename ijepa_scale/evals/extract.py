"""Images -> one feature vector each, from a frozen encoder."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn


@torch.no_grad()
def pooled_features(encoder: nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Average of an encoder's tokens over the patches of each image (I-JEPA, arXiv:2301.08243, A.2: no [cls] token).

    encoder: images -> (B, N, D) tokens after the final LayerNorm, in any float dtype.
    batches: uint8 (B, 3, H, W) images; they are moved to the encoder's device.
    Returns (num_images, D) float32 on the CPU. Each module's training mode is as before on return.
    """
    tensor = next(chain(encoder.parameters(), encoder.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        # Averaged in fp32: a bf16 sum over hundreds of patches would lose the small differences between images.
        pooled = [encoder(images.to(device, non_blocking=True)).float().mean(dim=1).cpu() for images in batches]
    finally:
        for module, training in modes:
            module.training = training
    if not pooled:
        raise ValueError("no images to compute features of: the batches are empty; check the split and its filter")
    return torch.cat(pooled)


def check_probe_data(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> None:
    """Raise ValueError unless features are finite (n, D) and labels (n,) integers from 0 up, train and test alike."""
    for split, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError(
                f"{split} features and labels must be (n, D) and (n,) with n >= 1, "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise ValueError(
                f"{split} labels must be integers from 0 up, got {labels.dtype} from {labels.min().item()}; "
                "drop images without a label"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                f"{split} features hold NaN or infinity: the encoder has diverged; use an older checkpoint"
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train and test features must be equally wide, got {train_features.shape[1]} and {test_features.shape[1]}"
        )
