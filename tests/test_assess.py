from types import SimpleNamespace

import pytest

from ijepa_scale.assess import report_indices
from ijepa_scale.build import EvalImages
from ijepa_scale.config import ReportConfig


@pytest.mark.parametrize("ranks, train, test", [(1, 4000, 2000), (2, 10, 6), (3, 30, 30)])
def test_probes_are_not_scored_on_images_they_are_fitted_on(ranks, train, test):
    """Where there is no other split; and there is something of both."""
    images = range(31)
    run = SimpleNamespace(
        ranks=SimpleNamespace(world_size=ranks),
        config=SimpleNamespace(report=ReportConfig(train_images=train, test_images=test)),
        evaluation=EvalImages(images, images, held_out=False),
    )
    fit, score = report_indices(run)
    assert fit and score and not set(fit) & set(score) and len({*fit, *score}) == len(fit) + len(score)
    assert len(fit) % ranks == len(score) % ranks == 0 and {*fit, *score} <= set(images)
