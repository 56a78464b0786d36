"""The faults of `tests.faults` can all be planted; whether each is caught, the slow test finds out."""

import ast
from pathlib import Path

import pytest

from tests import faults

PACKAGE = Path(__file__).parents[1] / "pyro_guides"
by_fault = pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)


@by_fault
def test_a_fault_changes_one_place_and_leaves_python(fault):
    text = (PACKAGE / fault.file).read_text()
    planted = fault.planted(text)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))


@by_fault
def test_the_tests_that_are_to_notice_are_there(fault):
    assert fault.tests
    assert all((PACKAGE.parent / name).is_file() for name in fault.tests)


def test_there_are_a_dozen_and_one_that_has_moved_is_told():
    assert len(faults.FAULTS) >= 12
    with pytest.raises(ValueError, match="occurs 0 times in"):
        faults.FAULTS[0].planted("")


@pytest.mark.slow
@pytest.mark.exhaustive  # each runs tests of its own: `make faults` shows them
@by_fault
def test_a_fault_is_caught(fault):
    assert faults.caught_by(fault, fault.tests)
