"""The figures of the quickstart: real images, an exact posterior, no tolerance but Monte-Carlo noise."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, layers, optim

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
STEPS = 3000
# Exact mean log evidence of the 300 test images, and the best that a diagonal normal can reach.
EVIDENCE, DIAGONAL = -129.2683, -131.4015


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


@pytest.fixture(scope="module")
def images(quickstart):
    train, test, inked = quickstart.load_images()
    return [torch.tensor(pixels[:, inked], dtype=torch.float32) for pixels in (train, test)]


@pytest.fixture(scope="module")
def model(quickstart, images):
    return quickstart.FactorModel.fit(images[0].numpy())


def test_exact_answer_is_the_published_one(model, images):
    evidence, _, _ = model.exact(images[1])
    assert float(evidence) == pytest.approx(EVIDENCE, abs=2e-3)
    assert float(evidence - model.best_diagonal_gap()) == pytest.approx(DIAGONAL, abs=2e-3)


@pytest.mark.slow
def test_full_rank_reaches_the_exact_posterior(quickstart, model, images):
    guide = quickstart.train(model, FullRankNormal(), images[0], STEPS)
    _, mean, sd = model.exact(images[1])
    mean_error, sd_error = quickstart.errors(guide, images[1], mean, sd)
    # At the optimum log p - log q is constant, so the ELBO of 50 draws has hardly any Monte-Carlo error.
    assert quickstart.mean_elbo(model, guide, images[1]) == pytest.approx(EVIDENCE, abs=0.05)
    assert mean_error.max() < 0.05
    assert sd_error.max() < 0.03


@pytest.mark.slow
def test_diagonal_reaches_its_own_optimum_and_no_more(quickstart, model, images):
    guide = quickstart.train(model, DiagonalNormal(), images[0], STEPS)
    _, mean, sd = model.exact(images[1])
    mean_error, sd_error = quickstart.errors(guide, images[1], mean, sd)
    # Standard error of 300 x 200 draws: 0.008 nats.
    assert quickstart.mean_elbo(model, guide, images[1], repeats=200) == pytest.approx(DIAGONAL, abs=0.05)
    assert mean_error.median() < 0.05
    assert sd_error.median() > 0.1  # the control: a diagonal cannot have the exact standard deviations


@pytest.mark.slow
@pytest.mark.parametrize("ordinary", [False, True])
def test_only_scaled_layers_are_stable_at_a_large_learning_rate(model, images, monkeypatch, ordinary):
    if ordinary:
        monkeypatch.setattr(layers, "_GAIN", 1e9)  # a gain of one everywhere
    guide = AmortizedGuide(model).setup(images[0])
    svi = SVI(model, guide, optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = []
    with contextlib.suppress(ValueError):  # a guide whose weights diverged says so
        for _ in range(400):
            losses.append(svi.step(images[0][torch.randint(len(images[0]), (128,))]) / 128)
    stable = len(losses) == 400 and max(losses[100:]) < 200
    assert stable != ordinary
