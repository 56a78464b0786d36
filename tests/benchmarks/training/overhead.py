"""What ``fit`` adds to a step: against a bare loop, and against ``SVI.step``.

The bare loop is what an expert would write: no validation of arguments, one fused Adam, nothing observed.
``fit`` runs as it does by default, for 3,000 steps, and is interrupted after 150: 3 of its 60 looks at
validation rows fall into these. Its preparation counts in full. All take turns, on CPU time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_guides import AmortizedGuide, DiagonalNormal, fit
from tests.benchmarks.clock import SEED, Effort, Step, compare
from tests.benchmarks.report import Result

__all__ = ["run"]

ROWS, INPUTS, BATCH = 5000, 784, 128
STEPS = 150
RATE = 1e-3

Pair = tuple[Callable[[Tensor], None], AmortizedGuide, nn.Module]


def pair(x: Tensor) -> Pair:
    """A model, its guide, and its decoder, under a name of its own."""
    decoder = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, INPUTS))
    name = f"decoder{id(decoder)}"

    def model(x: Tensor) -> None:
        pyro.module(name, decoder)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model, AmortizedGuide(model, family=DiagonalNormal()).setup(x), decoder


def bare(x: Tensor) -> Step:
    """As many steps without anything else."""
    model, guide, decoder = pair(x)
    elbo = Trace_ELBO(max_plate_nesting=1)
    adam = torch.optim.Adam([*guide.parameters(), *decoder.parameters()], lr=RATE, fused=True)

    def steps() -> None:
        with pyro.validation_enabled(False):
            for _ in range(STEPS):
                batch = x[torch.randint(ROWS, (BATCH,))]
                loss = elbo.differentiable_loss(model, guide, batch) / ROWS
                loss.backward()
                adam.step()
                adam.zero_grad()
                loss.item()

    return steps


def svi(x: Tensor) -> Step:
    """As a user of Pyro writes it."""
    model, guide, _ = pair(x)
    trainer = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())

    def steps() -> None:
        for _ in range(STEPS):
            trainer.step(x[torch.randint(ROWS, (BATCH,))])

    return steps


class Interrupt:
    """A logger that ends a run early."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Called every tenth step."""
        if step == STEPS:
            raise KeyboardInterrupt


def fitted(x: Tensor, **options: Any) -> Step:
    """The first steps of a run by default."""
    model, guide, _ = pair(x)
    return lambda: fit(
        model, guide, x, batch_size=BATCH, learning_rate=RATE, seed=SEED, logger=Interrupt(), **options
    )


@contextmanager
def silent() -> Iterator[None]:
    """Without the warning that a run was interrupted."""
    logger = logging.getLogger("pyro_guides")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run(effort: Effort = Effort(rounds=6, steps=1, warmup=1)) -> list[Result]:  # noqa: B008 - frozen
    """Ratios per step."""
    x = (torch.rand(ROWS, INPUTS) < 0.3).float()
    steps = {
        "bare": bare(x),
        "svi": svi(x),
        "fit": fitted(x, validation=None),
        "fit, validated": fitted(x),
    }
    with silent():
        times = compare(steps, effort)
    where = f"{INPUTS} inputs, B={BATCH}"
    results = [Result("bare step, ms of CPU", where, times["bare"].milliseconds / STEPS)]
    for name in ("fit", "fit, validated"):
        results.append(Result(f"{name} / bare loop", where, *times[name].over(times["bare"]), target=1.15))
        results.append(Result(f"{name} / SVI.step", where, *times[name].over(times["svi"]), target=0.9))
    return results
