"""What is compared with, imported where it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def peer(name: str) -> ModuleType:
    """The package, or a line that says how to have it, and status 1."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r tests/requirements.txt") from error
