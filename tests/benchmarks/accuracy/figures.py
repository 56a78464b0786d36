"""From scores to the figures that have targets, and the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean

from tests.benchmarks.accuracy.jobs import Job, targets
from tests.benchmarks.accuracy.scoring import Score
from tests.benchmarks.report import Report, Result, Table

__all__ = ["report"]

Scores = Mapping[tuple[str, str], Score]

_NEAR_NORMAL, _LAYERED = ("regression", "GLM"), ("hierarchy",)
_FUNNELS = {"eight_schools_noncentered": 0.1, "eight_schools_centered": -0.1, "seeds_stanified": -0.1}
_COLUMNS = (
    *("model", "kind", "guide", "means off, average", "worst"),
    *("sd ratio, median", "least", "most", "k-hat", "ELBO", "±", "seconds"),
)


def report(found: Mapping[Job, Score | str]) -> Report:
    """All results and tables."""
    failed = {job: why for job, why in found.items() if isinstance(why, str)}
    scores = {job: what for job, what in found.items() if isinstance(what, Score)}
    first = {(job.target, job.guide): what for job, what in scores.items() if job.seed == 0}
    results = [*_regressions(first), *_hierarchies(first), *_modes(first), *_funnels(first)]
    return Report(results, [_everything(first, failed)])


def _regressions(scores: Scores) -> Iterator[Result]:
    for name in _of(_NEAR_NORMAL):
        if (at := scores.get((name, "full rank"))) is not None:
            yield Result("full rank: worst mean, in sds", name, at.worst_mean, target=0.05)
            yield Result("full rank: worst sd, off by a share of", name, _worst_sd(at), target=0.05)


def _hierarchies(scores: Scores) -> Iterator[Result]:
    better = []
    for name in _of(_LAYERED):
        if (at := scores.get((name, "flow"))) is None:
            continue
        yield Result("flow: worst mean, in sds", name, at.worst_mean, target=0.1)
        yield Result("flow: worst sd, off by a share of", name, _worst_sd(at), target=0.1)
        if (other := scores.get((name, "AutoNormalizingFlow"))) is not None:
            gain = at.elbo - other.elbo
            better.append(gain > 0.0)
            yield Result("flow: ELBO less AutoNormalizingFlow's", name, gain, at.elbo_error, floor=0.0)
    if better:
        share = fmean(better)
        yield Result("flow: share of hierarchies better than AutoNormalizingFlow", "all", share, floor=0.5)


def _modes(scores: Scores) -> Iterator[Result]:
    for (name, guide), at in scores.items():
        if targets()[name].flipped is None:
            continue
        mixture = guide == "mixture"
        share, bounds = "share of the second mode", {"floor": 0.45, "target": 0.55} if mixture else {}
        yield Result(f"{guide}: {share}", name, at.flipped, **bounds)
        yield Result(f"{guide}: ELBO", name, at.elbo, at.elbo_error, floor=-2115.1 if mixture else None)


def _funnels(scores: Scores) -> Iterator[Result]:
    for name, floor in _FUNNELS.items():
        pairs = [("flow", "full rank", floor), ("full rank", "diagonal", -0.05)]
        for rich, poor, least in pairs:
            if (name, rich) in scores and (name, poor) in scores:
                gain = scores[name, rich].elbo - scores[name, poor].elbo
                noise = math.hypot(scores[name, rich].elbo_error, scores[name, poor].elbo_error)
                yield Result(f"{rich}: ELBO less that of {poor}", name, gain, noise, floor=least)


def _of(kinds: tuple[str, ...]) -> list[str]:
    return [name for name, target in targets().items() if target.kind in kinds]


def _worst_sd(at: Score) -> float:
    return max(abs(ratio - 1.0) for ratio in at.ratios)


def _everything(scores: Scores, failed: Mapping[Job, str]) -> Table:
    rows = [
        (
            *(name, targets()[name].kind, guide, at.mean_error, at.worst_mean, *at.ratios),
            *(at.k_hat, f"{at.elbo:.2f}", f"{at.elbo_error:.2g}", f"{at.seconds:.0f}"),
        )
        for (name, guide), at in scores.items()
    ]
    note = "; ".join(f"{job.target}, {job.guide}, seed {job.seed}: {why}" for job, why in failed.items())
    return Table("Against the reference", _COLUMNS, rows, f"Not trained: {note}." if note else "")
