"""The benchmarks run, and a step at a fixed batch touches nothing as long as the data set."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

from tests.benchmarks import clock, report, speed

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


# --- the report


def test_the_table_shows_every_number_and_verdict():
    results = [
        report.Result("a", "X", 0.5, 0.01, target=1.0),
        report.Result("b", "X", 2.0, target=1.0),
        report.Result("c", "X", math.nan, target=1.0),
        report.Result("d", "X", 3.0),
    ]
    assert [result.verdict for result in results] == ["met", "missed", "missed", ""]
    lines = report.markdown(results).splitlines()
    assert lines[2] == "| a | X | 0.5 | 0.01 | ≤ 1 | met |"
    assert len(lines) == 6


def test_the_command_writes_what_it_measured(tmp_path):
    script = (
        "import tests.benchmarks.__main__ as main\n"
        "from tests.benchmarks.report import Result\n"
        "main.BENCHMARKS = {'speed': lambda: [Result('a', 'X', 0.5, target=1.0)]}\n"
        "main.main()"
    )
    out = tmp_path / "numbers.json"
    run = subprocess.run(
        [sys.executable, "-c", script, "--out", str(out)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert "| a | X | 0.5 |" in run.stdout
    written = json.loads(out.read_text())
    assert {"versions", "seed", "threads", "results"} <= written.keys()
    assert written["results"]["speed"][0]["verdict"] == "met"
