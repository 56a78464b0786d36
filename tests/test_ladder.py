"""The ladder: when it climbs, how, when it steps back, and that none of it is lost when a run is killed."""

import itertools
import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, NormalMixture, fit, storage
from pyro_guides.training import stages
from pyro_guides.training.checkpoints import Checkpoints
from pyro_guides.training.data import arguments_of
from pyro_guides.training.ladder import Evidence, check_ladder, climb, examine

F64 = {"dtype": torch.float64}
LOADINGS = torch.tensor([[1.0, 0.5, -0.3], [0.9, 0.6, 0.1]], **F64)  # a strongly correlated posterior
GOOD = Evidence(gap=0.001, error=0.001, lost=0.0, k_hat=-math.inf)
NARROW = Evidence(gap=0.5, error=0.01, lost=0.0, k_hat=-math.inf)
LOST = Evidence(gap=0.5, error=0.01, lost=0.6, k_hat=-math.inf)


def factors(x, shift=0.0):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS + shift, 0.5).to_event(1), obs=x)


def shifted(x):
    """A model that learns, too."""
    factors(x, pyro.param("shift", torch.zeros(3, **F64)))


def rows(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(count, 2, generator=draw, **F64), torch.randn(count, 3, generator=draw, **F64)
    return z @ LOADINGS + 0.5 * noise


def small(family=None):
    torch.manual_seed(7)
    return AmortizedGuide(factors, MLP(width=8, depth=1), family=family or DiagonalNormal())


def climbing(monkeypatch, evidence, ladder, guide=None, model=factors, **options):
    """Fit with evidence that is planted, one for each time it is asked for."""
    planted = iter(evidence)
    monkeypatch.setattr(stages, "examine", lambda *args: next(planted))
    options = {"max_steps": 20, "seed": 0, "validation": None, "learning_rate": 0.02, **options}
    guide = guide or small()
    return fit(model, guide, rows(40), ladder=ladder, **options), guide


def names(families):
    """Of families as they print themselves, or of rungs."""
    return [getattr(family, "family", str(family)).partition("(")[0] for family in families]


# --- what may be climbed


@pytest.mark.parametrize(
    ("ladder", "error", "message"),
    [
        ("FullRankNormal", TypeError, "ladder must be a list of families, simplest first"),
        (FullRankNormal(), TypeError, "ladder must be a list of families, simplest first"),
        ([FullRankNormal], TypeError, "list of families such as FullRankNormal"),
        (
            [FullRankNormal(), DiagonalNormal()],
            ValueError,
            r"climbed to DiagonalNormal\(.*\), for it must go upwards",
        ),
        ([NormalMixture(3), NormalMixture(2)], ValueError, "must go upwards"),
        ([DiagonalNormal()], ValueError, "must go upwards"),
    ],
)
def test_ladders_that_cannot_be_climbed(ladder, error, message):
    with pytest.raises(error, match=message):
        check_ladder(small().setup(rows(20)), ladder)


def test_a_ladder_takes_an_amortized_guide():
    with pytest.raises(TypeError, match="takes an AmortizedGuide, got a function"):
        check_ladder(lambda x: None, [FullRankNormal()])


def test_checking_a_ladder_leaves_the_guide_alone():
    guide = small().setup(rows(20))
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    families = [FullRankNormal(), NormalMixture(2)]
    assert check_ladder(guide, families) == tuple(families)
    assert check_ladder(guide, []) == ()
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert before.keys() == guide.state_dict().keys()
    assert names(guide.families) == ["DiagonalNormal"]


# --- what the evidence says


@pytest.mark.parametrize(
    ("evidence", "climbs", "anew"),
    [
        (GOOD, False, False),
        (NARROW, True, False),
        (LOST, True, True),
        (Evidence(0.5, 0.4, 0.0, -math.inf), False, False),  # within twice its error
        (Evidence(0.019, 0.001, 0.0, -math.inf), False, False),  # known, but small
        (Evidence(0.001, 0.001, 0.05, -math.inf), False, False),  # a mode of few rows
        (Evidence(0.001, 0.001, 0.2, -math.inf), True, True),
        (Evidence(0.001, 0.001, 0.0, 0.9), True, False),  # what rows share is not held
        (Evidence(math.nan, math.nan, 0.0, 0.5), False, False),  # nothing could be measured
    ],
)
def test_when_a_richer_family_is_worth_a_try(evidence, climbs, anew):
    assert evidence.family_holds_back == climbs
    assert evidence.modes_are_lost == anew


@pytest.mark.slow
def test_the_gap_of_a_diagonal_normal_is_found():
    """At the best diagonal normal, the gap is half the log ratio of the determinants: 0.55 nats."""
    precision = torch.eye(2, **F64) + LOADINGS @ LOADINGS.T / 0.25
    exact = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    assert exact > 0.4
    x, guide = rows(300), small()
    fit(factors, guide, x, max_steps=300, seed=0, validation=None)
    torch.manual_seed(0)
    evidence = examine(guide, arguments_of(rows(20, seed=1)), None)
    assert evidence.gap == pytest.approx(exact, abs=0.05)
    assert evidence.family_holds_back
    assert not evidence.modes_are_lost


# --- what is done then


def test_a_family_that_is_rich_enough_is_trained_to_the_end(monkeypatch):
    result, guide = climbing(monkeypatch, [GOOD], [FullRankNormal(), NormalMixture(2)])
    assert names(result.rungs) == ["DiagonalNormal"]
    assert result.rungs[0].steps == 5  # half of the steps for all rungs but the last
    assert result.rungs[0].how == "as it was"
    assert "rich enough" in result.rungs[0].verdict
    assert names(result.families) == names(guide.families) == ["DiagonalNormal"]
    assert result.steps == 5 + 20


def test_it_climbs_to_the_top_if_every_family_gains_and_holds_back(monkeypatch):
    ladder = [FullRankNormal(), NormalMixture(2)]
    result, _ = climbing(monkeypatch, [NARROW] * 3, ladder)
    assert [rung.how for rung in result.rungs] == ["as it was", "promoted", "promoted"]
    assert names(result.rungs) == ["DiagonalNormal", "FullRankNormal", "NormalMixture"]
    assert result.rungs[1].verdict.startswith("gained ")
    assert result.steps == 5 + 5 + 20
    assert names(result.families) == ["NormalMixture"]


def test_promotion_keeps_q():
    """What a richer family says before it is trained is what the one below it had learned."""
    x, guide = rows(20), small()
    fit(factors, guide, x, max_steps=20, seed=0, validation=None)
    before = guide.posterior(x, num_draws=20)
    climb(guide, FullRankNormal(), "promoted", arguments_of(x))
    after = guide.log_prob(before.draws, x)
    assert torch.allclose(after, before.log_q, atol=1e-9)


def test_lost_modes_keep_the_encoders_only(monkeypatch):
    begun = []

    def spy(guide, family, how, batch):
        before = {name: value.clone() for name, value in guide.network.encoders.state_dict().items()}
        learned = guide.network.head(0).output.bias.detach().clone()
        climb(guide, family, how, batch)
        now = guide.network.encoders.state_dict()
        begun.append((how, all(torch.equal(before[name], now[name]) for name in before), learned))
        begun.append(guide.network.head(0).output.bias.detach().clone())

    monkeypatch.setattr(stages, "climb", spy)
    fresh = small(FullRankNormal()).setup(rows(150)).network.head(0).output.bias.detach()
    result, _ = climbing(monkeypatch, [LOST, GOOD], [FullRankNormal()])
    (how, same_encoders, learned), start = begun
    assert how == "anew"
    assert result.rungs[1].how == "anew"
    assert same_encoders
    assert torch.allclose(start, fresh, atol=0.1)  # the prior's median, as it is drawn, and the first spread
    assert float((learned[2:] - start[2:4]).abs().min()) > 0.02  # that was something to lose


# --- stepping back


def stepping_back(monkeypatch, evidence, **options):
    """A rung that loses what was learned, and learns nothing: what was before, and is after."""
    seen = {}
    climb_to, step_back = stages.Stages._climb_to, stages.Stages._step_back

    def copied(self):
        found = {**self._guide.network.state_dict(), "shift": pyro.param("shift").detach()}
        return {name: value.clone() for name, value in found.items()}

    def watch_climb(self, family, how):
        seen["before"] = copied(self)
        climb_to(self, family, how)

    def watch_back(self):
        seen["tried"] = copied(self)
        step_back(self)
        seen["after"] = copied(self)

    monkeypatch.setattr(stages.Stages, "_climb_to", watch_climb)
    monkeypatch.setattr(stages.Stages, "_step_back", watch_back)
    guide = small(FullRankNormal())
    fit(shifted, guide, rows(40), max_steps=30, learning_rate=0.03, seed=1, validation=None)
    options = {"learning_rate": 1e-9, "max_steps": 20, **options}
    result, guide = climbing(monkeypatch, evidence, [NormalMixture(2)], guide, shifted, **options)
    return result, guide, seen


def test_without_a_gain_it_steps_back_to_the_last_bit(monkeypatch):
    result, guide, seen = stepping_back(monkeypatch, [LOST, GOOD])
    assert not torch.equal(seen["before"]["shift"], seen["tried"]["shift"])  # it was trained, if by little
    assert seen["before"].keys() == seen["after"].keys()
    assert all(torch.equal(value, seen["after"][name]) for name, value in seen["before"].items())
    assert names(result.rungs) == ["FullRankNormal", "NormalMixture"]
    assert "back to the family before" in result.rungs[1].verdict
    assert names(result.families) == names(guide.families) == ["FullRankNormal"]
    assert result.steps == 10 + 20 + 20


class CtrlC:
    """A logger, called every tenth step, that interrupts a run at its second call."""

    def __init__(self):
        self.calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt


def test_ctrl_c_on_a_rung_without_a_gain_steps_back(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "pyro_guides"):
        result, guide, seen = stepping_back(monkeypatch, [LOST], logger=CtrlC(), validation=0.3)
    assert result.stopped_by == "interrupt"
    assert names(guide.families) == ["FullRankNormal"]
    assert all(torch.equal(value, seen["after"][name]) for name, value in seen["before"].items())


# --- killed and resumed


def killing(write, writes):
    """Checkpoints that are written so many times, and no more."""
    count = itertools.count(1)

    def write_or_die(self, *args, **kwargs):
        write(self, *args, **kwargs)
        if next(count) == writes:
            raise RuntimeError("killed")

    return write_or_die


def judged(path):
    """How many rungs were, as a checkpoint says."""
    return len(storage.load(path, kind="checkpoint of pyro_guides.fit")["state"]["done"]["rungs"])


@pytest.mark.parametrize(
    ("evidence", "deaths"), [([NARROW] * 3, (2, 11)), ([LOST] * 3, (5,))], ids=["promoted", "anew"]
)
def test_a_ladder_that_was_killed_goes_on_as_if_it_was_not(monkeypatch, tmp_path, evidence, deaths):
    """Killed between two steps of the first, the last, and the second rung."""
    ladder, options = [FullRankNormal(), NormalMixture(2)], {"max_steps": 8, "checkpoint_every": 1}
    whole, kept = climbing(monkeypatch, evidence, ladder, **options)
    for writes in deaths:
        options["checkpoint"] = tmp_path / str(writes)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "write", killing(Checkpoints.write, writes))
            with pytest.raises(RuntimeError, match="killed"):
                climbing(patch, evidence, ladder, **options)
        left = evidence[judged(options["checkpoint"]) :]
        resumed, guide = climbing(monkeypatch, left, ladder, resume=True, **options)
        assert np.array_equal(resumed.losses, whole.losses)
        assert resumed.rungs == whole.rungs
        expected = kept.network.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in guide.network.state_dict().items())
