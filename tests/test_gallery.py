"""Twelve kinds of models, each with a guide of a few lines: it attaches, trains, and serves other rows."""

import inspect
import math
from pathlib import Path

import pytest
from pyro.infer import SVI

from pyro_guides import optim
from tests.benchmarks import clock, gallery
from tests.gallery import EXAMPLES
from tests.gallery.example import mean_field

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
BY_NAME = {example.name: example for example in EXAMPLES}

by_example = pytest.mark.parametrize("example", EXAMPLES, ids=list(BY_NAME))


@pytest.fixture(autouse=True)
def isolated():
    with clock.isolated():
        yield


def steps(model, guide, example, batches):
    svi = SVI(model, guide, optim.Adam({"lr": 0.01}), example.elbo())
    return [svi.step(*batch) for batch in batches]


@by_example
def test_a_guide_of_a_few_lines_attaches_and_serves_other_rows(example):
    data, model = example.data(), example.model()
    guide = example.guide(model)
    assert all(
        math.isfinite(loss) for loss in steps(model, guide, example, data.batches[:1] + data.batches[-1:])
    )
    assert math.isfinite(gallery.bound(example, model, guide, data, 1).value)
    assert math.isfinite(gallery.held_out_bound(example, model, guide, data, 1).value)
    posterior = guide.posterior(*data.held_out, num_draws=2)
    assert posterior.log_q.isfinite().all()
    assert posterior.log_p.isfinite().all()
    assert set(example.shared) < set(posterior.draws)


@by_example
def test_the_users_lines_are_few_and_on_the_page(example):
    assert len(inspect.getsource(example.guide).splitlines()) <= 5
    assert example.lines in PAGE.read_text()


@pytest.mark.parametrize("name", [e.name for e in EXAMPLES if not isinstance(e.autoguide, str)])
def test_the_autoguide_it_is_compared_with_attaches(name):
    example = BY_NAME[name]
    model, guide = example.autoguide(example.model())
    [loss] = steps(model, guide, example, example.data().batches)
    assert math.isfinite(loss)


@pytest.mark.parametrize("name", [e.name for e in EXAMPLES if isinstance(e.autoguide, str)])
def test_where_there_is_no_autoguide_there_can_be_none(name):
    example = BY_NAME[name]
    model, guide = mean_field(example.model())
    with pytest.raises((NotImplementedError, ValueError, RuntimeError)):
        steps(model, guide, example, example.data().batches)


def test_the_autoguide_has_no_answer_for_other_rows():
    example = BY_NAME["variational autoencoder"]
    model, guide = mean_field(example.model())
    data = example.data()
    steps(model, guide, example, data.batches)
    assert len(guide(*data.held_out)["z"]) == data.rows  # those of training, whatever it is given


def test_a_row_of_the_table():
    example = BY_NAME["clusters"]
    row = gallery.measure(example, steps=2, draws=2)
    assert math.isfinite(row.guide.value)
    assert math.isfinite(row.held_out.value)
    shown = gallery.table([row])
    [line] = shown.rows
    assert line[0] == "clusters"
    assert line[1].startswith("`AmortizedGuide(")
    assert len(line) == len(shown.columns)
