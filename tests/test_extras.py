import sys

import pytest

from ijepa_scale.evals.linear import RECIPES, Head, Kind
from ijepa_scale.extras import needed


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    assert needed("json", "math", extra="export").__name__ == "json"
    with pytest.raises(
        ValueError, match=r"nothere, norhere not installed; get it with: pip install 'ijepa-scale\[export\]'"
    ):
        needed("json", "nothere", "norhere", extra="export")


def test_a_package_that_is_there_and_lacks_a_part_is_no_missing_package(tmp_path, monkeypatch):
    (tmp_path / "halfthere.py").write_text("import ofwhatever")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="ofwhatever"):
        needed("halfthere", extra="export")


def test_lars_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm not installed; get it with: pip install 'ijepa-scale\[evaluate\]'"):
        Head(0, Kind(1, False, 0.1, 0.0), RECIPES["imagenet"], width=4, classes=2, seed=0)
