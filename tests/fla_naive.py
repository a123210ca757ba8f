"""The loops of flash-linear-attention, from their files: the package around wants a GPU."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def fla_naive(rule: str) -> ModuleType:
    """Their `ops/{rule}/naive.py`; skips the test where the package is not installed."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / f"ops/{rule}/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{rule.replace('/', '_')}", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
