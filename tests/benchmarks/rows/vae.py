"""Variational autoencoders of the same images, each trained with another family of posteriors.

Every family gets the same decoder, encoder (``MLP(200)``), optimizer, learning rate, warm-up and number of
steps; what training keeps are the weights of the best look at validation images. Bounds are means over
images that training never saw, and over as many that it did. The gap of the ELBO to log p(x) is split by
``check`` for some of the unseen ones.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    check,
    fit,
)
from pyro_guides.families import Family
from pyro_guides.objectives import LinearWarmup
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Table, Tier
from tests.benchmarks.rows import images
from tests.benchmarks.workers import each

__all__ = ["Bounds", "Found", "Size", "bounds", "run", "trained"]

# The slowest first, so that no core waits for the last one.
FAMILIES: dict[str, Family] = {
    "NormalizingFlow(kind='spline')": NormalizingFlow(),
    "NormalMixture(4)": NormalMixture(4),
    "NormalizingFlow(kind='affine')": NormalizingFlow(kind="affine"),
    "FullRankNormal()": FullRankNormal(),
    "LowRankNormal(4)": LowRankNormal(4),
    "DiagonalNormal()": DiagonalNormal(),
}
PLAIN, *_ = reversed(FAMILIES)
FLOWS = ("NormalizingFlow(kind='affine')", "NormalizingFlow(kind='spline')")
GAIN = 2.0  # nats of ELBO that a flow gains over the diagonal normal in published autoencoders
RATE = 1e-3
DRAWS = 500
ROWS_PER_PASS = 100
ACTIVE = 0.01  # the variance of posterior means over images from which a latent counts as used


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    families: tuple[str, ...] = tuple(FAMILIES)
    rows: int | None = None
    steps: int = 5000
    judged: int = 1000
    split: int = 50


SIZES: dict[Tier, Size] = {
    "full": Size(),
    "quick": Size((FLOWS[0], PLAIN), rows=4000, steps=400, judged=100, split=10),
}


class Bounds(NamedTuple):
    """Of each image: the ELBO, a bound with 500 draws; and how many latents vary with the image."""

    elbo: Tensor
    tight: Tensor
    active: int


class Found(NamedTuple):
    """What one family reached."""

    family: str
    train: Bounds
    test: Bounds
    amortization_gap: float
    family_gap: float
    seconds: float
    steps: int
    best: int


def bounds(guide: AmortizedGuide, x: Tensor) -> Bounds:
    """Judge all images, some at a time."""
    elbo, tight, means = [], [], []
    for posterior in guide.posteriors(x.split(ROWS_PER_PASS), num_draws=DRAWS):
        elbo.append(posterior.elbo)
        tight.append(posterior.bound()[0])
        means.append(posterior.mean()["z"])
    active = int((torch.cat(means).var(0) > ACTIVE).sum())
    return Bounds(torch.cat(elbo), torch.cat(tight), active)


def trained(family: str, size: Size) -> Found:
    """Train and judge one family."""
    data = images.load(size.rows)
    with isolated():
        pyro.set_rng_seed(SEED)
        model = images.Decoder()
        guide = AmortizedGuide(model, MLP(200), FAMILIES[family]).setup(data.train)
        start = time.process_time()
        result = fit(
            model,
            guide,
            data.train,
            validation=data.valid,
            max_steps=size.steps,
            learning_rate=RATE,
            tempering=LinearWarmup(size.steps // 5),
            patience=None,
            seed=SEED,
        )
        seconds = time.process_time() - start
        gaps = check(guide.posterior(data.test[: size.split]), modes=False, show=False).columns
        return Found(
            family,
            bounds(guide, data.train[: size.judged]),
            bounds(guide, data.test[: size.judged]),
            float(gaps["amortization_gap"].mean()),
            float(gaps["family_gap"].mean()),
            seconds,
            result.steps,
            result.best.step if result.best is not None else result.steps,
        )


def run(tier: Tier) -> Report:
    """All families."""
    size = SIZES[tier]
    found = each(functools.partial(trained, size=size), size.families)[::-1]
    return Report(_results(found, GAIN if tier == "full" else None), [_table(found, size)])


def _results(found: Sequence[Found], floor: float | None) -> list[Result]:
    """What flows gain, image by image, over the diagonal normal; a floor for the test ELBO."""
    by_name = {one.family: one for one in found}
    plain, results = by_name[PLAIN], []
    for name in [name for name in FLOWS if name in by_name]:
        for label, least in (("test", floor), ("train", None)):
            mine, other = getattr(by_name[name], label), getattr(plain, label)
            gains = (("ELBO", mine.elbo - other.elbo, least), ("bound", mine.tight - other.tight, None))
            for what, more, bar in gains:
                error = float(more.std()) / len(more) ** 0.5
                title = f"{what} gained over DiagonalNormal(), nats per {label} image"
                results.append(Result(title, name, float(more.mean()), error, floor=bar))
    return results


def _table(found: Sequence[Found], size: Size) -> Table:
    """One line per family."""
    columns = (
        "family",
        "test ELBO",
        "test bound",
        "gap",
        "train ELBO",
        "train bound",
        "family gap",
        "amortization gap",
        "latents used",
        "best at step",
        "seconds",
    )
    note = (
        f"Nats per image. Bound: {DRAWS} importance-weighted draws. The two gaps are of {size.split} test "
        f"images, up to the bound of ``check``, which is tighter; {images.LATENTS} latents; {size.steps} "
        "steps of batches of 128. Seconds of CPU on a machine that does other things, too."
    )
    return Table("Autoencoders of binary digits", columns, [_line(one) for one in found], note)


def _line(one: Found) -> list[Any]:
    pairs = [(float(part.elbo.mean()), float(part.tight.mean())) for part in (one.test, one.train)]
    (elbo, tight), (train_elbo, train_tight) = pairs
    numbers = (elbo, tight, tight - elbo, train_elbo, train_tight, one.family_gap, one.amortization_gap)
    return [
        one.family,
        *[f"{number:.2f}" for number in numbers],
        one.test.active,
        one.best,
        f"{one.seconds:.0f}",
    ]
