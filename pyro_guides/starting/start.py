"""Puts the learned groups of a guide where the posterior lies, before training."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from pyro_guides.arguments import check_flags
from pyro_guides.families import BoundMixture
from pyro_guides.guide import AmortizedGuide
from pyro_guides.network import Network
from pyro_guides.posterior import Query
from pyro_guides.starting.density import ONCE, Repeats
from pyro_guides.starting.placing import Place, centre, learned, settle, settle_apart
from pyro_guides.starting.target import (
    DRAWS,
    MOST_CORRELATED,
    location_and_spread,
    posterior_modes,
    posterior_places,
    values_in,
    whole_groups,
)

__all__ = ["Start", "find_start", "start_from"]

_log = logging.getLogger("pyro_guides")

_MOST_BLOCKS = 8  # subsamples that make up all rows
_LOOKS = 64  # draws that tell whether q has become better
_FAR = 5.0  # spreads of the prior
_AMORTIZED = "left, amortized"
_NOT_POSSIBLE = (NotImplementedError, RuntimeError, ValueError, TypeError)


@final
@dataclass(frozen=True)
class Start:
    """What :func:`find_start` did.

    Attributes:
        found: for each group, by its latents, how q starts: ``"posterior"``, ``"prior"``, ``"amortized,
            centred"``, or why it was left.
    """

    found: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "Start(" + "; ".join(f"{name}: {how}" for name, how in self.found.items()) + ")"


def find_start(guide: AmortizedGuide, *args: Any, again: bool = False, **kwargs: Any) -> Start:
    r"""Put the learned groups of a guide where the posterior lies, and learn them in its units from there.

    A learned group's u becomes :math:`a + L v`, and λ that of v: q is about standard in v, so that one step
    size serves data of any scale.

    * Where all groups are learned, a and L come from the normal with the highest ELBO of those met while
      climbing :math:`\log p(x, u)` from several starts. Families without correlations get the *conditional*
      standard deviations, at which their ELBO is highest. Where all is normal and q can hold it, q is exact.
      Values that other groups depend on, such as the scales of a hierarchy, get location and widths of their
      marginal, from which Laplace's method integrates the rest (16 of them and 256 values in all, at most).
    * A mixture over all latents starts with its components on the modes that climbs from 16 draws of the
      prior find, each weighing its share, if they find several.
    * Where others are amortized, a and L are those of the marginal, and all elements of an amortized group
      start in their middle. The rows must be few, 256 values at most, and the model must not have parameters
      of its own, which move the posterior as they are trained. :func:`~pyro_guides.fit` takes some rows, each
      counted as often as there are rows like it.
    * Where that is not possible - many rows, discrete latents, a funnel beside amortized rows - and for other
      mixtures, which are to find several modes, a and L are location and spread of the prior; q stays centred
      where ``init_loc_fn`` has put it, if that is inside.
    * What is neither possible nor better is left as it was; the result and the log ``pyro_guides`` say so.

    Sets the guide up if need be: call it with all rows, then. A model that subsamples its rows by itself is
    climbed on all of them if these are few subsamples, else on one. Parameters of the model are not touched.
    Deterministic given torch's random state.

    Args:
        guide: a guide, not yet trained.
        *args: the model's arguments.
        again: whether to start anew although parameters have moved, which forgets what was learned by the
            groups that are not left.
        **kwargs: the model's keyword arguments.

    Raises:
        TypeError: ``guide`` is no guide.
        RuntimeError: the guide has been trained.

    Source: Lu Zhang, Bob Carpenter, Andrew Gelman, Aki Vehtari, "Pathfinder: Parallel quasi-Newton
    variational inference", 2022, arXiv:2108.03782; here with exact Hessians, and as the start of training.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide
        >>> from pyro_guides.starting import find_start
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1000.0))
        ...     with pyro.plate("row", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> x = 500.0 + torch.randn(100)
        >>> guide = AmortizedGuide(model)
        >>> find_start(guide, x)
        Start('mean': posterior)
        >>> abs(float(guide.median(x)["mean"] - x.mean())) < 1e-2
        True
    """
    if not isinstance(guide, AmortizedGuide):
        raise TypeError(f"find_start(guide, ...) takes an AmortizedGuide, got a {type(guide).__name__}")
    check_flags("find_start", again=again)
    return start_from(guide, args, kwargs, again=again)


def start_from(
    guide: AmortizedGuide,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    repeats: Repeats = ONCE,
    *,
    again: bool = False,
) -> Start:
    """:func:`find_start` from rows of which each counts several times.

    Args:
        guide: the guide.
        args: the model's arguments.
        kwargs: its keyword arguments.
        repeats: how many rows those at hand stand for.
        again: whether to start anew although parameters have moved.

    Raises:
        RuntimeError: the guide has been trained.
    """
    guide.setup(*args, **kwargs)
    was_trained = guide.is_trained
    if was_trained and not again:
        raise RuntimeError(
            "find_start() would forget what the guide has learned: call it before training, or with "
            "again=True"
        )
    found = _refused(guide)
    if len(found) < len(guide.network.parts):
        with torch.no_grad():
            found |= _settled(guide, args, kwargs, repeats, found)
        if not (was_trained and any(how.startswith("left") for how in found.values())):
            guide._start = guide.network.fingerprint()
    names = {i: str(guide.network.parts[i].group).removeprefix("latents ") for i in sorted(found)}
    for index, name in names.items():
        _log.info("find_start(): %s: %s", name, found[index])
    return Start({name: found[index] for index, name in names.items()})


def _settled(
    guide: AmortizedGuide,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    repeats: Repeats,
    refused: Mapping[int, str],
) -> dict[int, str]:
    """Start all groups but those that are refused; returns how."""
    found = dict(refused)
    try:
        query = _query(guide, args, kwargs)
        found |= _from_modes(query, found)
        settled, why = _from_posterior(query, found, repeats)
        found |= settled
        found |= _from_prior(query, found, why)
    except _NOT_POSSIBLE as error:
        reason = f"left, since {_first_line(error)}"
        found |= {i: reason for i in range(len(guide.network.parts)) if i not in found}
    return found


def _refused(guide: AmortizedGuide) -> dict[int, str]:
    """The groups that cannot be started, by position, and why."""
    found = {}
    for index, part in enumerate(guide.network.parts):
        if part.group.discrete:
            found[index] = "left, discrete"
        elif any(guide._require_memory().is_live(name) for name in part.group.sites):
            found[index] = "left, support, mask or scale depend on other latents"
        elif part.group.running:
            found[index] = "left, a sequence"
        elif part.encodings:
            found[index] = _AMORTIZED
        elif learned(guide.network.head(index)) is None:
            found[index] = "left, promoted"
        elif guide.network.family(index).closed_under is None:
            found[index] = f"left, {type(part.family).__name__} has no units"
    return found


def _query(guide: AmortizedGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Query:
    """All rows, if they are to be had in a few runs of the model; else those of one run."""
    try:
        query = Query.of(guide, args, kwargs)
        blocks = query.model.blocks
        if blocks is None or len(blocks.indices) <= _MOST_BLOCKS:
            return query
    except NotImplementedError as error:
        _log.info("find_start(): not all rows are to be had: %s", error)
    return _one_run(guide, args, kwargs)


def _one_run(guide: AmortizedGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Query:
    return Query(guide, args, kwargs, guide._structure(args, kwargs, complete=True), {})


def _from_posterior(query: Query, refused: Mapping[int, str], repeats: Repeats) -> tuple[dict[int, str], str]:
    """Start learned groups where the posterior lies; returns which, and why those that are left are not."""
    network = query.guide.network
    chosen = [i for i in whole_groups(query, refused) if not isinstance(network.family(i), BoundMixture)]
    if not chosen or any(how != _AMORTIZED for how in refused.values()):
        return {}, ""
    if refused and query.opened and values_in(query.structure) > MOST_CORRELATED:
        query = _one_run(query.guide, query.args, query.kwargs)
    try:
        target, middles = posterior_places(query, repeats)
    except _NOT_POSSIBLE as error:
        return {}, f", since {_first_line(error)}"
    chosen = [index for index in chosen if index in target]
    before, width = _elbo(query), query.guide._plan.init_scale
    with _put_back_on_error(network) as put_back:
        for index in chosen:
            settle(network, index, target[index], query.structure.plates)
        centred = [index for index, middle in middles.items() if centre(network, index, middle, width)]
        # Where q of others is not trained, the guide's ELBO does not tell how well those that are learned
        # lie.
        if refused or _elbo(query) >= before:
            return dict.fromkeys(chosen, "posterior") | dict.fromkeys(centred, "amortized, centred"), ""
        put_back()
    return dict.fromkeys(chosen, "left, since its ELBO is higher where it is"), ""


def _from_modes(query: Query, refused: Mapping[int, str]) -> dict[int, str]:
    """Start a mixture over all latents where the posterior has its modes, if it has several; returns how."""
    network = query.guide.network
    group = network.parts[0].group
    if refused or len(network.parts) > 1 or group.plates or not isinstance(network.family(0), BoundMixture):
        return {}
    try:
        locs, covariances, shares = posterior_modes(query, group)
    except _NOT_POSSIBLE:
        return {}
    if len(locs) < 2:
        return {}
    settle_apart(network, 0, locs, covariances, shares)
    return {0: f"posterior, {len(locs)} modes"}


def _from_prior(query: Query, settled: Mapping[int, str], why: str) -> dict[int, str]:
    """Measure groups in units of the prior, and leave q where it starts; returns which, and why."""
    network = query.guide.network
    chosen = whole_groups(query, settled)
    found = {i: "left, of a subsample" for i in range(len(network.parts)) if i not in {*settled, *chosen}}
    if not chosen:
        return found
    values = query.model.simulate({}, query.held, count=DRAWS).values
    with _put_back_on_error(network):
        for index in chosen:
            settle(network, index, _prior_place(query, index, values), query.structure.plates)
    return found | dict.fromkeys(chosen, f"prior{why}")


def _prior_place(query: Query, index: int, values: Mapping[str, Tensor]) -> Place:
    """Units of draws of the prior, and q where it is, if that is among them."""
    network = query.guide.network
    latents = [query.structure.latents[name] for name in network.parts[index].group.sites]
    parts = [latent.unconstrain(values[latent.name]) for latent in latents]
    middle, spread = location_and_spread(torch.cat(parts, dim=-1))
    frame = network.family(index).frame(network.head(index).example())
    centre = middle if frame is None else frame[0]
    inside = (centre - middle).abs() < _FAR * spread
    return Place(torch.where(inside, centre, middle), spread, spread=query.guide._plan.init_scale)


@contextmanager
def _put_back_on_error(network: Network) -> Iterator[Callable[[], None]]:
    """Leave q as it was if something fails on the way; yields what puts it back."""
    heads, values = list(network.heads), copy.deepcopy(network.state_dict())

    def put_back() -> None:
        network.heads = nn.ModuleList(heads)
        network.load_state_dict(values)

    try:
        yield put_back
    except BaseException:
        put_back()
        raise


def _elbo(query: Query) -> float:
    """The ELBO of the guide, from draws that are the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = query.run(_LOOKS)
    values = query.draws_of(trace)
    log_p = query.by_row(query.model.score(values, query.held).log_prob, ())
    elbo = float((log_p - query.log_q_of(trace, ())).mean())
    return elbo if math.isfinite(elbo) else -math.inf


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
