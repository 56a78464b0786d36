"""The benchmarks run, and a step at a fixed batch touches nothing as long as the data set."""

import math
from pathlib import Path

import pyro
import pytest
import torch

from tests.benchmarks import clock
from tests.benchmarks.speed import steps as speed

ROOT = Path(__file__).parents[1]
QUICK = clock.Effort(rounds=2, steps=1, warmup=1)
TINY = speed.Size(features=3, latents=2, batch=4)
ROWS = 10**6


@pytest.fixture(autouse=True)
def isolated():
    with clock.isolated():
        yield


# --- every measurement


@pytest.mark.parametrize(
    "measure", [speed.against_hand, speed.families, speed.against_rows, speed.against_particles]
)
def test_measurements_are_positive_numbers(measure):
    results = measure(TINY, QUICK)
    assert results
    assert all(math.isfinite(result.value) and result.value > 0 for result in results)
    assert all(result.spread >= 0 for result in results)


def test_one_encoder_pass_serves_all_particles():
    results = speed.against_particles(TINY, QUICK, particles=3)
    assert [result.value for result in results if "passes" in result.what] == [1.0]


def test_all_candidates_train_the_same_network():
    plain = [*speed.Encoder(TINY).parameters(), *speed.Decoder(TINY).parameters()]
    found = [sorted(parameter.shape for parameter in plain)]
    for candidate in (speed.ours, speed.hand):
        with clock.isolated():
            candidate(TINY)()
            found.append(sorted(parameter.shape for parameter in pyro.get_param_store().values()))
    assert found[0] == found[1] == found[2]


def test_the_clock_compares_round_by_round():
    slow, fast = clock.Timing((2.0, 6.0, 9.0)), clock.Timing((1.0, 2.0, 3.0))
    assert slow.over(fast) == (3.0, 0.25)


# --- nothing in a step grows with N


@pytest.mark.parametrize("encoder", [None, speed.MLP])
@pytest.mark.parametrize("subsamples", [False, True])
@pytest.mark.parametrize(
    "family",
    [speed.DiagonalNormal(), speed.FullRankNormal(), speed.LowRankNormal(1)],
    ids=lambda family: type(family).__name__,
)
def test_a_step_allocates_the_same_for_every_data_set(encoder, subsamples, family):
    counts = []
    for rows in (10**3, ROWS):
        options = {"family": family, "rows": rows, "subsamples": subsamples}
        step = clock.seeded(speed.ours, TINY, encoder, **options)
        step()
        counts.append(clock.allocations(step))
    few, many = counts
    # A subsample is drawn with spares for repeats, whose number is random.
    assert many.bytes == pytest.approx(few.bytes, rel=0.02)
    assert few.largest == many.largest < ROWS / 10


def test_the_counter_sees_what_grows_with_n():
    step = speed.hand(TINY, rows=ROWS)  # Pyro's plate permutes all rows to choose a few
    step()
    assert clock.allocations(step).largest == ROWS


def test_the_counter_sees_backward_passes_but_no_views():
    x = torch.ones(100, requires_grad=True)
    found = clock.allocations(lambda: (x.view(10, 10)[0] * 2.0).sum().backward())
    assert found.largest == 100  # the gradient of the slice
    assert clock.allocations(lambda: x.detach().view(10, 10)[0]) == clock.Allocations(0, 0)
