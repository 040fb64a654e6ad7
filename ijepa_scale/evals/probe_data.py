"""What can be probed: features and labels that a probe may be fitted on and scored on."""

import torch


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
