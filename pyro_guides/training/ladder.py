"""Adaptive complexity: the simplest family first, and a richer one when the family is what holds q back."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch

from pyro_guides.diagnostics import check
from pyro_guides.diagnostics.shared import are_some_rows, rows_share, shared_statistics
from pyro_guides.families import Family
from pyro_guides.guide import AmortizedGuide
from pyro_guides.planning import build
from pyro_guides.promotion import promote
from pyro_guides.training.data import Arguments
from pyro_guides.training.judging import mean_and_error

__all__ = ["Evidence", "How", "Rung", "check_ladder", "climb", "examine"]

How = Literal["as it was", "promoted", "anew"]

_SMALL_GAP = 0.02  # nats per row that no richer family is worth
_MANY_LOST = 0.1  # of the rows
_LARGEST_K = 0.7
_DRAWS, _SHARED_DRAWS = 500, 200


@final
@dataclass(frozen=True)
class Rung:
    """What the ladder did at one family, and why.

    Attributes:
        family: the family.
        how: "as it was" when training began, "promoted" with what the former family had learned, or "anew",
            with its encoders alone.
        steps: how many steps it was trained before it was judged.
        elbo: the validation ELBO it came to, in nats per row.
        gap: what a better family could gain, in nats per row; NaN where it was not measured.
        verdict: what was decided, in words.
    """

    family: str
    how: How
    steps: int
    elbo: float
    gap: float
    verdict: str


@final
@dataclass(frozen=True)
class Evidence:
    """What holds q back.

    Attributes:
        gap: the mean family gap, in nats per row, with its error.
        lost: the share of rows of which q has lost a mode.
        k_hat: of what rows share; -inf if they share nothing, or it is not known.
    """

    gap: float
    error: float
    lost: float
    k_hat: float

    @property
    def family_holds_back(self) -> bool:
        """Whether a richer family is worth a try."""
        gap = self.gap > _SMALL_GAP and not self.gap < 2.0 * self.error
        return gap or self.modes_are_lost or self.k_hat > _LARGEST_K

    @property
    def modes_are_lost(self) -> bool:
        """Whether what was learned is in the way of a richer family."""
        return self.lost > _MANY_LOST

    def __str__(self) -> str:
        said = [f"family gap {self.gap:.3f} ± {self.error:.3f} nats per row"]
        if self.lost:
            said.append(f"{self.lost:.0%} of rows have lost a mode")
        if self.k_hat > _LARGEST_K:
            said.append(f"k-hat {self.k_hat:.2f} of what rows share")
        return ", ".join(said)


def check_ladder(guide: Any, ladder: Sequence[Any]) -> tuple[Family, ...]:
    """The families to climb.

    Raises:
        TypeError: the guide or a rung is no such thing.
        ValueError: a rung cannot hold what the one below it has become.
    """
    if not ladder:
        return ()
    if isinstance(ladder, (str, Family)) or not isinstance(ladder, Sequence):
        raise TypeError(f"ladder must be a list of families, simplest first, got {ladder!r}")
    if not isinstance(guide, AmortizedGuide):
        raise TypeError(f"a ladder takes an AmortizedGuide, got a {type(guide).__name__}")
    for family in ladder:
        if not isinstance(family, Family):
            raise TypeError(f"ladder must be a list of families such as FullRankNormal(), got {family!r}")
    trial = copy.deepcopy(guide.network)
    for family in ladder:
        try:
            promote(trial, family, only_new=False)
        except ValueError as error:
            raise ValueError(
                f"ladder={list(ladder)} cannot be climbed to {family}, for it must go upwards: {error}"
            ) from None
    return tuple(ladder)


def climb(guide: AmortizedGuide, family: Family, how: How, batch: Arguments) -> None:
    """Give the guide a richer family, in place.

    Args:
        guide: the guide.
        family: the new family.
        how: "promoted" keeps q; "anew" keeps the encoders only.
        batch: what to read the model with.
    """
    network = copy.deepcopy(guide.network)
    if how == "promoted":
        promote(network, family, only_new=False)
    else:
        encoders = network.encoders.state_dict()
        plan = replace(guide._plan, encoder=copy.deepcopy(guide._plan.encoder), family=family)
        network, _ = build(plan, guide.model, batch.args, batch.kwargs)
        network.encoders.load_state_dict(encoders)
    guide.replace_network(network)


def examine(guide: AmortizedGuide, rows: Arguments, trained_on: Arguments | None) -> Evidence:
    """Find out what holds q back.

    Args:
        guide: the guide.
        rows: some rows that it does not train on.
        trained_on: all rows that it trains on, which alone tell how good q is of what they share; None if
            these are too many to look at together.
    """
    posterior = guide.posterior(*rows.args, num_draws=_DRAWS, **rows.kwargs)
    share = rows_share(posterior)
    local = posterior.local() if share else posterior
    try:
        found = check(local, show=False)
    except (NotImplementedError, RuntimeError, ValueError):  # refined and searched through is not every model
        found = check(local, gaps=False, modes=False, show=False)
    columns = found.columns
    gap = columns.get("family_gap", columns["gap"])
    gap = gap[gap.isfinite()].reshape(-1)
    lost = columns.get("missing", torch.zeros(1)).gt(0).double().mean()
    k_hat = _of_shared(guide, trained_on) if share and trained_on is not None else -math.inf
    return Evidence(*mean_and_error(gap, 0.0 if len(gap) else math.nan), float(lost), k_hat)


def _of_shared(guide: AmortizedGuide, rows: Arguments) -> float:
    """The k-hat of what rows share."""
    posterior = guide.posterior(*rows.args, num_draws=_SHARED_DRAWS, **rows.kwargs)
    return -math.inf if are_some_rows(posterior) else shared_statistics(posterior)["k_hat"]
