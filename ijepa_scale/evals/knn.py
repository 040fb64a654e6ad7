"""Weighted k-nearest-neighbour classification of frozen features: no training, no setting to tune."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ijepa_scale.evals.evaluation import Evaluation, Outcome, accuracy, commonest_share
from ijepa_scale.evals.features import features_of
from ijepa_scale.evals.probe_data import check_probe_data

CHUNK_SIMILARITIES = 1 << 24  # similarities held at once; in fp64, 128 MiB
TIE_STEP = 1e-15  # a neighbour's place in the training set counts this much, so that equals rank by it


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """Weighted k-nearest neighbours, as DINO (arXiv:2104.14294)."""

    k: tuple[int, ...] = (10, 20, 100, 200)  # each is reported
    temperature: float = 0.07  # a neighbour at cosine similarity s votes with exp(s / temperature)

    def __post_init__(self) -> None:
        check_knn(self.k, self.temperature)


def check_knn(k: Sequence[int], temperature: float) -> None:
    if not k or min(k) < 1 or temperature <= 0.0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got k {list(k)} and temperature {temperature}")


def knn(evaluation: Evaluation, settings: KnnSettings) -> Outcome:
    """Each k on the output of the last block, of the centre of each image. The first k of the best is the result."""
    train, test = (features_of(evaluation, part) for part in (evaluation.train, evaluation.test))
    if not evaluation.ranks.first:
        return Outcome(measures=[])
    device = evaluation.ranks.device
    data = (tensor.to(device) for part in (train, test) for tensor in part.tensors())
    ks = sorted({min(k, len(train.labels)) for k in settings.k})
    predicted = knn_predictions(*data, ks=ks, temperature=settings.temperature)
    chance = commonest_share(test.labels)
    measures = [
        accuracy(f"k-NN, k = {k}", predicted[k].cpu().numpy(), test.labels, chance=chance, settings={"k": k})
        for k in ks
    ]
    return Outcome.best_of(measures, [predicted[k].cpu().numpy() for k in ks], test.labels)


def knn_top1(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Percent of test images whose k nearest training images vote for their class: see knn_predictions().

    k is cut to the size of the training set.
    """
    data = (train_features, train_labels, test_features, test_labels)
    k = min(k, len(train_labels)) if k > 0 else k
    predicted = knn_predictions(*data, ks=[k], temperature=temperature)[k]
    return 100.0 * int((predicted == test_labels).sum()) / len(test_labels)


@torch.no_grad()
def knn_predictions(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, torch.Tensor]:
    """The class of each test image by its k nearest training images, for each k (DINO, arXiv:2104.14294, section 4).

    Nearest by cosine similarity s; a neighbour votes with weight exp(s / temperature).
    Features (n, D) in any float dtype, labels (n,) integers from 0 up, all on one device; ks at most as many as there
    are training images. Equally near images rank by their place in it, equal votes go to the lower class.
    Returns k -> (n,) int64.
    """
    check_knn(ks, temperature)
    check_probe_data(train_features, train_labels, test_features, test_labels)
    num_train, train_labels = len(train_features), train_labels.long()
    num_classes = int(train_labels.max()) + 1
    train = F.normalize(train_features.float(), dim=1)
    tie_break = TIE_STEP * torch.arange(num_train, dtype=torch.float64, device=train.device)
    chunk_size = max(1, CHUNK_SIMILARITIES // num_train)
    predicted: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for features in test_features.split(chunk_size):
        similarity = F.normalize(features.float(), dim=1) @ train.T
        # fp32 values less a tie-break in fp64: topk alone leaves the order of equals open.
        nearest = (similarity.double() - tie_break).topk(max(ks), dim=1).indices
        similarity = similarity.gather(1, nearest).double()
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the largest is 1: cannot overflow
        votes = weights.new_zeros(len(features), num_classes)
        for neighbour in range(max(ks)):  # one at a time: the order of the sum, and so its rounding, is fixed
            votes.scatter_add_(1, train_labels[nearest[:, neighbour, None]], weights[:, neighbour, None])
            if neighbour + 1 in predicted:
                predicted[neighbour + 1].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}
