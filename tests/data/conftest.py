import datasets
import pytest

from ijepa_scale.data.sources.folders import say_once


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No test touches the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(autouse=True)
def said_anew():
    """What a process says once is said in every test."""
    say_once.cache_clear()
