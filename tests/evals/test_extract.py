import pytest
import torch
from torch import nn

from ijepa_scale.evals.extract import check_probe_data, pooled_features


class Patches(nn.Module):
    """Means of 4 x 4 patches times a weight: features that a test can work out, with a dropout that must be off."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 7.0, dtype=dtype).reshape(3, 2))
        self.dropout = nn.Dropout(0.5)
        self.seen_dtypes = set()

    def forward(self, images):
        self.seen_dtypes.add(images.dtype)
        patches = nn.functional.avg_pool2d(images.to(self.weight.dtype), 4).flatten(2).transpose(1, 2)
        return self.dropout(patches @ self.weight)


def random_images(n, seed=0):
    return torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_features_are_the_mean_over_patches_whatever_the_batches():
    encoder, images = Patches(), random_images(7)
    expected = images.float().mean(dim=(2, 3)) @ encoder.weight.detach()
    for sizes in ([7], [3, 3, 1], [1] * 7):
        features = pooled_features(encoder, iter(images.split(sizes)))
        torch.testing.assert_close(features, expected)
        assert features.dtype == torch.float32 and not features.requires_grad
    assert encoder.seen_dtypes == {torch.uint8}


def test_tokens_in_bf16_are_averaged_in_fp32():
    class Rising(nn.Module):
        def forward(self, images):  # 512 tokens of 1, then 512 of 1 + 2**-7, its bf16 neighbour
            tokens = torch.ones(len(images), 1024, 1, dtype=torch.bfloat16)
            tokens[:, 512:] += 2**-7
            return tokens

    features = pooled_features(Rising(), [random_images(2)])
    torch.testing.assert_close(features, torch.full((2, 1), 1 + 2**-8))
    assert pooled_features(Patches(torch.bfloat16), [random_images(2)]).dtype == torch.float32


def test_training_mode_of_each_module_is_restored_even_after_an_error():
    encoder = nn.Sequential(Patches(), nn.Dropout())
    encoder.train()
    encoder[1].eval()
    pooled_features(encoder, [random_images(2)])
    assert encoder.training and encoder[0].dropout.training and not encoder[1].training
    with pytest.raises(RuntimeError):
        pooled_features(encoder, [torch.zeros(2, 5, 8, 8, dtype=torch.uint8)])
    assert encoder.training and not encoder[1].training


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        pooled_features(Patches(), [])


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
