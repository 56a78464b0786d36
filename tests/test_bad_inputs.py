"""Every bad input must be answered by an error that says what is wrong and what to do; nothing may change.

The catalogue is `bad_inputs`.
"""

import re
from pathlib import Path

import pyro
import pytest
import torch
from bad_inputs import CASES, GUIDES, check_message
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import nn

from pyro_guides import AmortizedGuide

README = Path(__file__).parents[1] / "README.md"
PLAIN = [case for case in CASES if not case.guide]
CALLS = [case for case in CASES if case.guide]


def state_of(guide):
    """Everything that a bad call must not change."""
    store = pyro.get_param_store()
    found = {f"store.{name}": store[name].detach().clone() for name in store}
    modules = {"guide": guide if guide.is_set_up else None, "encoder": guide._plan.encoder}
    for label, module in modules.items():
        tensors = module.state_dict() if isinstance(module, nn.Module) else {}
        found |= {f"{label}.{name}": value.clone() for name, value in tensors.items()}
    return found


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=0, msg=f"{name} has changed")


def answer(case, *args):
    """The message of the error that answers a bad input; Pyro's stacks are empty afterwards."""
    with pytest.raises(case.error) as caught:
        case.call(*args)
    assert caught.type is case.error
    assert (list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)) == ([], [])
    return str(caught.value)


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_a_bad_call_is_refused_and_changes_nothing(case):
    model, options, good = GUIDES[case.guide]
    guide = AmortizedGuide(model, **options())
    if case.later:
        good(guide)
    before, set_up = state_of(guide), guide.is_set_up
    check_message(answer(case, guide), case.message)
    assert guide.is_set_up is set_up
    assert_same(before, state_of(guide))
    assert all(value.isfinite().all() for value in good(guide).values())


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_bad_input_is_refused(case):
    messages = {answer(case) for _ in range(2)}  # not an error about what the first attempt left behind
    for message in messages:
        check_message(message, case.message)


def test_the_readme_counts_them():
    [number] = re.findall(r"([\d,]+) bad inputs", README.read_text())
    assert int(number.replace(",", "")) == len(CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_checker_checks():
    check_message("a b c", "a ... c")
    for wrong in ("c ... a", "a ... d"):
        with pytest.raises(AssertionError, match="in its place"):
            check_message("a b c", wrong)
    with pytest.raises(AssertionError, match="has changed"):
        assert_same({"a": torch.zeros(2)}, {"a": torch.ones(2)})
