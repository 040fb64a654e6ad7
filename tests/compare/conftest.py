import pytest

from ijepa_scale.plan import dry_run


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    """Drawn for the tokens that --dry-run tells, which nothing here reads."""
    monkeypatch.setattr(dry_run, "SAMPLED_STEPS", 2)
