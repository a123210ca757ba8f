"""The worked example of CONTRIBUTING.md is everything a new mixer needs: it passes the contract."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from seqzoo import layers
from tests.properties import CHECKS, Case

ROOT = Path(__file__).parent.parent


def example(path: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"<!-- file: {re.escape(path)} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found, f"CONTRIBUTING.md shows no {path}"
    return found[1]


def load(name: str, path: str, folder: Path):
    file = folder / Path(path).name
    file.write_text(example(path))
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def min_gru(tmp_path, monkeypatch):
    load("seqzoo_example_min_gru", "layers/min_gru.py", tmp_path)
    monkeypatch.setitem(layers.CATALOGUE, "min_gru", "seqzoo_example_min_gru:MinGRU")
    yield
    del sys.modules["seqzoo_example_min_gru"]


@pytest.mark.parametrize("options", [{}, {"width": 48, "bias": False}], ids=["defaults", "variant"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_strangers_mixer_passes_the_contract(check, options, min_gru):
    check(Case("min_gru", options))


def test_its_parity_test_passes(tmp_path, min_gru):
    load("seqzoo_example_test", "tests/parity/test_min_gru.py", tmp_path)
    try:
        sys.modules["seqzoo_example_test"].test_min_gru_is_the_papers_loop()
    finally:
        del sys.modules["seqzoo_example_test"]
