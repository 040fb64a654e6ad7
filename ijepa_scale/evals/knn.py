"""Weighted k-nearest-neighbour classification of frozen features: no training, no setting to tune."""

import torch
import torch.nn.functional as F

from ijepa_scale.evals.probe_data import check_probe_data

CHUNK_SIMILARITIES = 1 << 24  # similarities held at once; in fp64, 128 MiB
TIE_STEP = 1e-15  # a neighbour's place in the training set counts this much, so that equals rank by it


@torch.no_grad()
def knn_top1(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Percent of test images whose k nearest training images vote for their class (DINO, arXiv:2104.14294, section 4).

    Nearest by cosine similarity s; a neighbour votes with weight exp(s / temperature).
    Features (n, D) in any float dtype, labels (n,) integers from 0 up, all on one device. k is cut to the size of the
    training set. Equally near images rank by their place in it, equal votes go to the lower class.
    """
    check_probe_data(train_features, train_labels, test_features, test_labels)
    if k < 1 or temperature <= 0.0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got k {k} and temperature {temperature}")
    num_train = len(train_features)
    k = min(k, num_train)
    train_labels, test_labels = train_labels.long(), test_labels.long()
    num_classes = int(train_labels.max()) + 1
    train = F.normalize(train_features.float(), dim=1)
    tie_break = TIE_STEP * torch.arange(num_train, dtype=torch.float64, device=train.device)
    correct = 0
    chunk_size = max(1, CHUNK_SIMILARITIES // num_train)
    for features, labels in zip(test_features.split(chunk_size), test_labels.split(chunk_size), strict=True):
        similarity = F.normalize(features.float(), dim=1) @ train.T
        # fp32 values less a tie-break in fp64: topk alone leaves the order of equals open.
        nearest = (similarity.double() - tie_break).topk(k, dim=1).indices
        similarity = similarity.gather(1, nearest).double()
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the largest is 1: cannot overflow
        votes = weights.new_zeros(len(labels), num_classes)
        for neighbour in range(k):  # one at a time: the order of the sum, and so its rounding, is fixed
            votes.scatter_add_(1, train_labels[nearest[:, neighbour, None]], weights[:, neighbour, None])
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100.0 * correct / len(test_labels)
