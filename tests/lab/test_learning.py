"""What docs/lab/learning.py tells of features without labels."""

import sys

import pytest
import torch

from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "docs" / "lab"))
import learning


def test_lidar_counts_the_directions_that_tell_images_apart():
    """Four of sixteen, in which images differ a hundred times as much as their views; and views that tell nothing."""
    draws = torch.Generator().manual_seed(0)
    views = 0.01 * torch.randn(2000, 4, 16, generator=draws, dtype=torch.float64)
    assert learning.lidar(views) > 14  # all alike
    views[..., :4] += torch.randn(2000, 1, 4, generator=draws, dtype=torch.float64)
    assert learning.lidar(views) == pytest.approx(4, rel=0.02)


def test_tokens_are_told_apart_by_their_image():
    tokens = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    turned = tokens.roll(1, 0)
    assert learning.same_image([(tokens, 2 * tokens), (tokens, turned)]) == 50
