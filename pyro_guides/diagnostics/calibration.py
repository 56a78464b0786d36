r"""Simulation-based calibration of an amortized guide, from the model alone and without refitting.

Of latents and data that the model draws, :math:`(z^*, x) \sim p(z, x)`, z* is a draw from p(z | x). Draws
from a right q(z | x) cannot be told from it: its rank among them is uniform, by whatever function of z and x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pyro_guides.diagnostics.comparison import compare
from pyro_guides.diagnostics.simulations import amortized, other_plates, simulate
from pyro_guides.posterior import Posterior
from pyro_guides.statistics import arguments, uniformity
from pyro_guides.statistics.arguments import Array
from pyro_guides.variables import Variable

__all__ = ["Calibration", "Coverage", "calibrate"]

_LEVEL = 0.01  # of a verdict; the rate of false alarms
_DENSITY, _TARP = "density region", "tarp"
_ADVICE = {
    "too narrow": "train on, take a richer family (guide.promote), or weight draws (posterior.resample)",
    "too wide": "train on with a falling learning rate, or take a richer family (guide.promote)",
    "shifted up": "train on, or let the encoder see all that the latent depends on",
    "shifted down": "train on, or let the encoder see all that the latent depends on",
    "of a wrong shape": "take a richer family (guide.promote)",
}


@final
@dataclass(frozen=True, eq=False)
class Coverage:
    """How often regions of q hold the true values, which under a right q is as often as their level says.

    Attributes:
        levels: the regions' probability under q, ``(L,)``.
        central: by site, the share of true values in the central interval, ``(L, *shape of a row)``.
        density: the share of true values in the region of highest density, ``(L,)``.
        band: where each of these shares stays under a right q.
    """

    levels: Array
    central: dict[str, Array]
    density: Array
    band: uniformity.Band


@final
@dataclass(frozen=True, eq=False)
class Calibration:
    """Where true values lie among draws from q, for n rows that the model has simulated.

    Made by :func:`calibrate`; its representation is the verdict.

    Attributes:
        ranks: by site, how many draws are below the true value, ``(n, *shape of a row)``; ties are broken at
            random.
        pit: by site, the ranks spread over the unit interval, uniform under a right q.
        hpd: the level of the region of highest density that just holds the true values, ``(n,)``; as uniform.
        tarp: the share of draws nearer to a reference than the true values, ``(n,)``; as uniform.
        num_draws: S, how many draws each of them got.
        plates: by site, the plates within a row, outermost first.
        levels: of :meth:`coverage`, unless it is told others.
        probability: of the band of :meth:`coverage`.
    """

    ranks: dict[str, NDArray[np.int64]]
    pit: dict[str, Array]
    hpd: Array
    tarp: Array
    num_draws: int
    plates: Mapping[str, tuple[str, ...]]
    levels: Array
    probability: float

    @property
    def num_simulations(self) -> int:
        """The number n of rows that were simulated."""
        return len(self.hpd)

    def p_values(self) -> dict[str, Array]:
        """How likely a right q is to look this bad: by site, ``(*shape of a row)``, and of whole rows."""
        values = {name: uniformity.p_value(pit) for name, pit in self.pit.items()}
        return values | {_DENSITY: uniformity.p_value(self.hpd), _TARP: uniformity.p_value(self.tarp)}

    @property
    def p_value(self) -> float:
        """One p-value of all tests together, adjusted for their number."""
        return float(uniformity.holm(np.concatenate([np.ravel(p) for p in self.p_values().values()])))

    def is_calibrated(self, level: float = _LEVEL) -> bool:
        """Whether :attr:`p_value` is above a level, which is the rate of false alarms."""
        return self.p_value > arguments.probability("level", level)

    def coverage(self, levels: ArrayLike | None = None) -> Coverage:
        """How often central intervals and density regions hold the true values.

        Args:
            levels: increasing, in [0, 1]; those that :func:`calibrate` was given if None.
        """
        points = self.levels if levels is None else arguments.increasing("levels", levels)
        central = {name: uniformity.coverage(pit, points) for name, pit in self.pit.items()}
        density = np.stack([(self.hpd <= level).mean() for level in points])
        return Coverage(points, central, density, uniformity.band(points, len(self.hpd), self.probability))

    def __repr__(self) -> str:
        p_value = self.p_value
        p = f"p = {p_value:.2g}" if p_value > 1e-12 else "p < 1e-12"
        found = f"({p}, {self.num_simulations:,} simulations)"
        return f"calibrated {found}" if p_value > _LEVEL else f"not calibrated {found}: {self._verdict()}"

    def _verdict(self) -> str:
        """What is most wrong with q, of one scalar if that can be said, and what to do about it."""
        p_values = self.p_values()
        tests = sum(map(np.size, p_values.values()))
        density, tarp = (float(p_values.pop(name)) for name in (_DENSITY, _TARP))
        site = min(p_values, key=lambda name: p_values[name].min())
        if tests * p_values[site].min() <= _LEVEL:
            worst, shape = int(p_values[site].argmin()), p_values[site].shape
            index = ", ".join(map(str, np.unravel_index(worst, shape)))
            label = f"{site}[{index}]" if shape else site
            kind = _misfit(self.pit[site].reshape(len(self.hpd), -1)[:, worst])
            return f"{label} is {kind}; {_ADVICE[kind]}"
        if density <= tarp:
            kind = "too narrow" if self.hpd.mean() > 0.5 else "too wide"
            return f"q as a whole is {kind}; {_ADVICE[kind]}"
        return "q misses how latents depend on the data or on each other; train on, or take a richer family"

    def to_groups(self) -> dict[str, dict[str, Variable]]:
        """The ranks as ArviZ's ``plot_ecdf_pit`` takes them; see :func:`pyro_guides.to_arviz`."""
        dims = {name: ("chain", "draw", *plates) for name, plates in self.plates.items()}
        return {"prior_sbc": {name: Variable(x[None], dims[name]) for name, x in self.ranks.items()}}

    @property
    def attrs(self) -> dict[str, Any]:
        """What is noted beside the arrays."""
        return {"sbc_num_draws": self.num_draws, "sbc_p_value": self.p_value}


def _misfit(pit: Array) -> str:
    """How q differs from what true values look like, by the moment that is furthest off."""
    unit = math.sqrt(12 * len(pit))
    shift, spread = (pit.mean() - 0.5) * unit, (np.abs(2.0 * pit - 1.0).mean() - 0.5) * unit
    if max(abs(shift), abs(spread)) < 3.0:
        return "of a wrong shape"
    if abs(shift) > abs(spread):
        return "shifted down" if shift > 0.0 else "shifted up"
    return "too narrow" if spread > 0.0 else "too wide"


def calibrate(
    posterior: Posterior,
    *,
    num_simulations: int = 1000,
    num_draws: int = 1000,
    levels: ArrayLike | None = None,
    probability: float = 0.95,
    seed: int | None = None,
) -> Calibration:
    r"""Judge an amortized q by data that the model itself draws, for which true values are known.

    The model draws whole data sets like the given one, and the guide answers all of them in a few passes.
    Judged are the latents that have an encoder, row by row where rows are independent; those whose λ was
    learned for one data set are held at the draw of q that lies closest to its centre. Tested for
    uniformity are, among the draws, the ranks of each scalar, of log q of all latents of a row, and of the
    distance to values that made similar data; the last finds a q that ignores its data, as no other can.

    q is judged where the *prior* puts the data. A guide that was trained on other data, real or few, may
    fail here and still be good there: train it on simulations, too, or take priors that fit the data.

    Args:
        posterior: what ``guide.posterior(...)`` returns.
        num_simulations: n, rounded up to whole data sets: pass fewer rows if that takes long.
        num_draws: S, of each.
        levels: of :meth:`Calibration.coverage`, increasing, in [0, 1]; by default 0.05, 0.1, ..., 0.95.
        probability: with which all levels' coverages stay in their band under a right q.
        seed: of all random numbers, leaving torch's own generator as it is; None takes its next ones.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
        ValueError: less than 100 simulations or 20 draws; nothing is amortized; the posterior was refined or
            resampled; or simulated data cannot take the place of the real ones.
        NotImplementedError: the model subsamples by itself, or masks latents.

    Source: Sean Talts et al., "Validating Bayesian Inference Algorithms with Simulation-Based Calibration",
    2018, arXiv:1804.06788; Joeri Hermans et al., "A Trust Crisis In Simulation-Based Inference?", 2022,
    arXiv:2110.06581 (density regions); Pablo Lemos et al., "Sampling-Based Accuracy Testing of Posterior
    Estimators for General Inference", 2023, arXiv:2302.03026 (distances).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide, calibrate
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AmortizedGuide(model)  # not trained: its q has a standard deviation of 0.1
        >>> calibrate(guide.posterior(torch.randn(10)), num_simulations=100, num_draws=100)
        not calibrated (p < 1e-12, 100 simulations): z is too narrow; train on, ...
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"calibrate takes what guide.posterior(...) returns, got a {type(posterior).__name__}; call "
            "guide.posterior(*args) with rows to simulate others like them"
        )
    least = arguments.count("num_simulations", num_simulations, least=100)
    draws = arguments.count("num_draws", num_draws, least=20)
    points = arguments.increasing("levels", np.linspace(0.05, 0.95, 19) if levels is None else levels)
    inside = arguments.probability("probability", probability)
    if seed is not None:
        arguments.whole("seed", seed)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        query = amortized(posterior)
        simulated = simulate(query, least)
        found = compare(query, simulated, draws)
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
    ranks = {name: rank.numpy(force=True) for name, rank in found.ranks.items()}
    distances = [x.numpy(force=True) for x in (found.draws, found.truth, simulated.references)]
    return Calibration(
        ranks=ranks,
        pit={name: uniformity.ranks_to_pit(rank, draws, rng) for name, rank in ranks.items()},
        hpd=uniformity.ranks_to_pit(found.denser.numpy(force=True), draws, rng),
        tarp=uniformity.tarp(*distances, rng=rng),
        num_draws=draws,
        plates={name: other_plates(query, latent) for name, latent in query.latents.items()},
        levels=points,
        probability=inside,
    )
