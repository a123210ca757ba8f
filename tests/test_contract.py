"""Every mixer of the catalogue against every property of the contract (see tests/properties.py)."""

import pytest

from tests import properties
from tests.properties import CHECKS, Case, catalogue

CASES = catalogue()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, check):
    check(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_agree_with_the_float64_reference(case: Case, poisoned_empty):
    properties.backends(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_sequences_stay_finite(case: Case):
    quadratic = case.build().caps.state in ("growing", "none") and not case.loose
    properties.long(case, 4096 if quadratic else 65_536)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_sequences_stay_finite_in_full(case: Case):
    properties.long(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # within torch 2.13
@pytest.mark.filterwarnings("ignore:.*code generation for complex operators.*:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inductor_equals_eager(case: Case):
    properties.compiles(case, backend="inductor")
