"""Accuracy on reference posteriors: 33 models, our guides and Pyro's, against long runs of NUTS.

Models, data and references are those of posteriordb and inference_gym (`tests/benchmarks/data/README.md`),
written as ordinary Pyro models. Every guide gets the same budget: 750 steps of 4 vectorized particles,
which is little, and 3,000, the default of `fit`, where scales of a hierarchy are unknown; all rows in each
step, float64, one thread, seed 0. Ours are trained by `fit` as it is by default, λ of all latents being
parameters (`amortize=()`, what there is to do for one data set). Pyro's AutoNormal, AutoMultivariateNormal
and AutoNormalizingFlow (two affine autoregressive transforms of twice 64 hidden units, or as many as there
are latents) take ClippedAdam from the same rate of 0.01, decayed 20 times, and start at zero in
unconstrained space, since a draw from a nearly flat prior is a hopeless start. Errors of means are in the
reference's standard deviations; sd ratios are the guide's over the reference's. With 10,000 draws on both
sides chance alone makes errors of 0.014 in means and of 1 % in sds. k-hat is that of the joint draws.
"""

from __future__ import annotations

from tests.benchmarks.accuracy.figures import report
from tests.benchmarks.accuracy.jobs import done, jobs
from tests.benchmarks.report import Report, Tier
from tests.benchmarks.workers import each

__all__ = ["run"]


def run(tier: Tier) -> Report:
    """Train and judge every guide on every model of the tier."""
    work = jobs(tier)
    return report(dict(zip(work, each(done, work), strict=True)))
