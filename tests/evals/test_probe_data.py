import pytest
import torch

from ijepa_scale.evals.probe_data import check_probe_data


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f, y: (f, y[:-1]), r"\(n, D\) and \(n,\)"),
        (lambda f, y: (f[:0], y[:0]), "n >= 1"),
        (lambda f, y: (f, y - 1), "from 0 up"),
        (lambda f, y: (f, y.float()), "from 0 up"),
        (lambda f, y: (f.clone().index_fill_(0, torch.tensor([1]), float("nan")), y), "NaN"),
        (lambda f, y: (f[:, :2], y), "equally wide"),
    ],
)
def test_bad_probe_data_is_refused(change, message):
    features, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    check_probe_data(features, labels, features, labels)
    with pytest.raises(ValueError, match=message):
        check_probe_data(features, labels, *change(features, labels))
