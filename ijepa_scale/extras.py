"""Packages that are installed for what is asked of them alone."""

import importlib
from types import ModuleType


def needed(*names: str, extra: str) -> ModuleType:
    """The first of these packages; all must be there. Raises ValueError, with the line that installs them.

    extra: of pyproject.toml, which lists them.
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # what is missing is a part of it
                raise
            missing.append(name)
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; get it with: pip install 'ijepa-scale[{extra}]'")
    return importlib.import_module(names[0])
