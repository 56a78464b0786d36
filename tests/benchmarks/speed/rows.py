"""Rows that training never saw: one pass of the encoder, or one inference for each of them.

The factor model of 16 factors on scikit-learn's digits, whose posterior is known. A guide trained on 1,497
images serves another 300; everything else starts anew for each image: stochastic variational inference
(Pyro's ``AutoMultivariateNormal``, and our guide without an encoder), the trained guide refined, and Pyro's
NUTS. Break-even is the number of rows from which training and one pass cost less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyro_guides import AmortizedGuide, FullRankNormal, optim
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Table
from tests.benchmarks.rows.linear import BATCH, RATE, FactorModel, digits

__all__ = ["Size", "new_rows"]

FACTORS = 16
DRAWS = 1000
FEWEST = 10.0  # times that an alternative per row may at least take longer than the guide


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int = 3000
    rows: int = 4
    row_steps: int = 1000
    warmup: int = 200
    nuts: bool = True


class Found(NamedTuple):
    """Seconds per row and draws per row of one way, and its error: of means, in exact sds, at the worst."""

    seconds: float
    draws: int
    error: float


Way = Callable[[Tensor], Tensor]  # from images to draws, ``(S, rows, K)``


def measured(way: Way, x: Tensor, model: FactorModel, *, one_by_one: bool) -> Found:
    """Time a way of getting posterior draws, and judge them."""
    start = time.process_time()
    draws = torch.cat([way(row) for row in x.split(1)], dim=1) if one_by_one else way(x)
    seconds = (time.process_time() - start) / len(x)
    mean, sd = model.posterior(x)
    error = ((draws.double().mean(0) - mean) / sd).abs().max()
    return Found(seconds, len(draws), float(error))


def amortized(model: FactorModel, x: Tensor, steps: int) -> tuple[AmortizedGuide, float]:
    """A guide of all rows, and what training it took."""
    guide = AmortizedGuide(model, family=FullRankNormal()).setup(x)
    start = time.process_time()
    _descend(model, guide, lambda: x[torch.randint(len(x), (BATCH,))], steps, RATE)
    return guide, time.process_time() - start


def _descend(model: Any, guide: Any, batch: Callable[[], Tensor], steps: int, rate: float) -> None:
    adam = optim.Adam({"lr": rate}, schedule=lambda step: min(1.0, 2.0 - 2.0 * step / steps))
    svi = SVI(model, guide, adam, Trace_ELBO())
    for _ in range(steps):
        svi.step(batch())


def per_row(model: FactorModel, make: Callable[[], Any], steps: int) -> Way:
    """A guide for each image, trained from scratch."""

    def way(x: Tensor) -> Tensor:
        with pyro.get_param_store().scope():
            guide = make()
            _descend(model, guide, lambda: x, steps, 0.05)
            with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-2):
                drawn: Tensor = guide(x)["z"]
        return drawn

    return way


def nuts(model: FactorModel, warmup: int) -> Way:
    """Pyro's sampler with its usual adaptation."""

    def way(x: Tensor) -> Tensor:
        mcmc = MCMC(NUTS(model), num_samples=DRAWS, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(x)
        drawn: Tensor = mcmc.get_samples()["z"]
        return drawn

    return way


def ways(model: FactorModel, guide: AmortizedGuide, size: Size) -> dict[str, Way]:
    """Everything that starts anew for each image."""
    found: dict[str, Way] = {
        f"SVI, AutoMultivariateNormal, {size.row_steps} steps": per_row(
            model, lambda: AutoMultivariateNormal(model), size.row_steps
        ),
        f"SVI, our guide without encoder, {size.row_steps} steps": per_row(
            model, lambda: AmortizedGuide(model, family=FullRankNormal(), amortize=()), size.row_steps
        ),
        "guide, refined": lambda x: guide.posterior(x, num_draws=DRAWS).refine().draws["z"],
    }
    if size.nuts:
        found[f"NUTS, {size.warmup} + {DRAWS}"] = nuts(model, size.warmup)
    return found


def new_rows(size: Size) -> Report:
    """Time, draws per second, errors and break-even of all ways."""
    train, test = digits()
    with isolated():
        pyro.set_rng_seed(SEED)
        model = FactorModel(FACTORS, train)
        guide, training = amortized(model, train, size.steps)
        encoded = measured(
            lambda x: guide.posterior(x, num_draws=DRAWS).draws["z"], test, model, one_by_one=False
        )
        found = {
            name: measured(way, test[: size.rows], model, one_by_one=True)
            for name, way in ways(model, guide, size).items()
        }
    results, rows = [], [_line("guide, one pass", encoded, None)]
    for name, other in found.items():
        even = training / (other.seconds - encoded.seconds)
        rows.append(_line(name, other, None if "refined" in name else even))
        ratio = other.seconds / encoded.seconds
        results.append(Result(f"seconds per row: {name} / guide", "digits, 16 factors", ratio, floor=FEWEST))
    columns = (
        "way", "seconds per row", "draws per second", "worst error of means, in sd", "break-even, rows"
    )  # fmt: skip
    note = (
        f"Training the guide took {training:.0f} s of CPU, once. {DRAWS} draws per row; the guide served "
        f"{len(test)} rows, the others {size.rows}. The error of means has {DRAWS**-0.5:.3f} of noise."
    )
    return Report(results, [Table("Rows that training never saw", columns, rows, note)])


def _line(name: str, found: Found, even: float | None) -> list[str | float]:
    numbers = (f"{found.seconds:.2g}", f"{found.draws / found.seconds:,.0f}", f"{found.error:.2f}")
    return [name, *numbers, "" if even is None else f"{even:.0f}"]
