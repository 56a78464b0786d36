"""Early stopping: are the weights that ``fit`` keeps as good as the best ones that it passed by?

A hundred binary digits and a decoder with 256 units: after some 150 steps the test ELBO falls. A hundred
other digits validate. Three hundred more, which ``fit`` never sees, tell the test ELBO at every look, always
from the same random numbers; what is reported is by how much the kept weights fall short of the best look.
The learning rate is a third of the default, at which the test ELBO changes by half a nat from look to look.
Seeds: 0 to 19, each with digits and weights of its own.
"""

from __future__ import annotations

import statistics

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_guides import AmortizedGuide, DiagonalNormal, fit
from tests.benchmarks.clock import SEED
from tests.benchmarks.report import Result
from tests.benchmarks.training.digits import Autoencoder, images

__all__ = ["run"]

SEEDS = 20
TRAIN, VALIDATION, TEST = 100, 100, 300
STEPS = 600
RATE = 0.003
DRAWS = 2
SHORT = 0.3


class Witness:
    """A logger that measures the test ELBO, per row, every tenth step: where ``fit`` looks, too."""

    def __init__(self, model: Autoencoder, guide: AmortizedGuide, rows: Tensor) -> None:
        self.model, self.guide, self.rows = model, guide, rows
        self.seen: dict[int, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One more look."""
        self.seen[step or 0] = self.elbo()

    def elbo(self) -> float:
        """The test ELBO, from the same random numbers each time."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED)
            loss = Trace_ELBO(num_particles=DRAWS).loss(self.model, self.guide, self.rows)
        return -loss / len(self.rows)


def shortfalls(seed: int) -> tuple[float, float]:
    """By how much the kept weights, and the last ones, are below the best look, in nats per row."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    x = (images() > 0.45).float()
    train, held, test = x[: TRAIN + VALIDATION + TEST].split([TRAIN, VALIDATION, TEST])
    model = Autoencoder(256, 1)
    guide = AmortizedGuide(model, family=DiagonalNormal())
    witness = Witness(model, guide, test)
    fit(
        model,
        guide,
        train,
        validation=held,
        max_steps=STEPS,
        learning_rate=RATE,
        seed=seed,
        logger=witness,
    )
    best, last = max(witness.seen.values()), list(witness.seen.values())[-1]
    return best - witness.elbo(), best - last


def run() -> list[Result]:
    """How often and by how much they fall short; the last weights are the control."""
    kept, last = zip(*(shortfalls(seed) for seed in range(SEEDS)), strict=True)
    where = f"digits, N={TRAIN}, {SEEDS} seeds"
    return [
        Result(f"early stopping: seeds short by > {SHORT} nats", where, _many(kept), target=SEEDS // 10),
        Result("early stopping: nats short, median", where, statistics.median(kept)),
        Result("early stopping: nats short, worst", where, max(kept)),
        Result(f"last weights: seeds short by > {SHORT} nats", where, _many(last)),
        Result("last weights: nats short, median", where, statistics.median(last)),
    ]


def _many(shorts: tuple[float, ...]) -> int:
    return sum(short > SHORT for short in shorts)
