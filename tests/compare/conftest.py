import pytest

from ijepa_scale.plan import sampling


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    """Drawn for the tokens that --dry-run tells, which nothing here reads."""
    monkeypatch.setattr(sampling, "SAMPLED_STEPS", 2)
