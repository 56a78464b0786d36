"""What examples/trust.py prints about real images, against the exact answer."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from pyro_guides import FullRankNormal

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def trust():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("trust")
    for name in ("trust", "quickstart"):  # other tests load the latter by its path
        del sys.modules[name]


@pytest.fixture
def factors(trust):
    """A model that a few steps fit, and its data."""
    weights = torch.zeros(3, 16)
    weights[0, 0] = 2.0
    return trust.FactorModel(torch.zeros(3), weights, torch.ones(3)), torch.randn(50, 3)


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def exact_line(section):
    """The numbers that are found beside the exact ones."""
    (line,) = (line for line in section.splitlines() if line.startswith("Log p(x)"))
    return numbers(line)


def test_training_tells_how_it_went(trust, factors):
    model, x = factors
    guide, result = trust.trained(model, FullRankNormal(), x, 40)
    assert result.steps == 40
    assert guide.is_trained
    assert result.losses[-5:].sum() < result.losses[:5].sum()


def test_refinement_reaches_the_exact_posterior(trust, factors, capsys):
    model, x = factors
    trust.refinement_report(model, x, x[:3], steps=1)
    _, _, *lines = capsys.readouterr().out.splitlines()
    (encoder, _), (refined, _), (gain,) = map(numbers, lines)
    assert encoder > 1
    assert abs(refined) < 0.05
    assert gain == pytest.approx(encoder - refined, rel=0.2)  # of other draws


@pytest.fixture(scope="module")
def run(trust, tmp_path_factory):
    """What a run of 400 steps prints in each section, and the folder that it saves files in."""
    folder, printed = tmp_path_factory.mktemp("trust"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        trust.main(400, folder)
    _, *sections = printed.getvalue().split("--- ")
    return sections, folder


@pytest.mark.slow
def test_gaps_are_the_exact_ones(run):
    for section, name, gap in zip(
        run[0], ("DiagonalNormal()", "FullRankNormal()"), (2.133, 0.0), strict=False
    ):
        assert section.startswith(name)
        bound, evidence, found, exact = exact_line(section)
        assert exact == pytest.approx(gap, abs=1e-3)
        assert (bound, found) == pytest.approx((evidence, exact), abs=0.05)


@pytest.mark.slow
def test_verdicts_are_right(run):
    (diagonal, full, calibration, inverted, _), _ = run
    assert int(re.search(r"(\d+) of 100 rows can be trusted", diagonal)[1]) < 50
    assert int(re.search(r"(\d+) of 100 rows can be trusted", full)[1]) > 95
    assert "DiagonalNormal(): not calibrated" in calibration
    assert "FullRankNormal(): calibrated" in calibration
    assert "20 rows are unlike those of training" in inverted
    bound, evidence = exact_line(inverted)
    assert bound == pytest.approx(evidence, abs=1)  # though q is hundreds of nats off


@pytest.mark.slow
def test_files_are_saved_as_it_says(run):
    sections, folder = run
    assert {path.name for path in folder.iterdir()} == {"trust.nc", "trust.png"}
    assert f"Saved in {folder}" in sections[-1]
