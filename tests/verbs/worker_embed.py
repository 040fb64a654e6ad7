"""launch/embed.py, and the same so slowly that a test can stop it half-way; each in a process of its own."""

import sys
import time
from typing import Any
from unittest import mock

from ijepa_scale.evals import extract, stores
from ijepa_scale.verbs.embed import main


def embed(*arguments: str) -> None:
    sys.exit(main([*arguments]))


def slowly(*arguments: str) -> None:
    """A tenth of a second a batch, after each of which what there is is kept."""
    features = extract._features

    def slow(*given: Any) -> Any:
        time.sleep(0.1)
        return features(*given)

    with mock.patch.object(extract, "_features", slow), mock.patch.object(stores, "SAVE_SECONDS", 0.0):
        embed(*arguments)
