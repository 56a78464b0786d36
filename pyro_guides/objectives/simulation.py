"""Training of a guide on what its model simulates, without any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_guides.guide import AmortizedGuide
from pyro_guides.inputs import with_observations
from pyro_guides.objectives.base import Objective
from pyro_guides.objectives.frozen import frozen
from pyro_guides.objectives.rows import Guide, Model, random_sites
from pyro_guides.objectives.tempering import Unweighed
from pyro_guides.objectives.terms import log_prob_of
from pyro_guides.scoring import ModelCall
from pyro_guides.simulating import as_argument, check_reach
from pyro_guides.structure import Structure, read
from pyro_guides.turns import take_turns

__all__ = ["ForwardKL"]

PerSite = dict[str, Tensor]


@final
class ForwardKL(Objective):
    r"""Minus log q of the latents that simulated data were made from: neural posterior estimation.

    .. math:: \mathcal L = -\mathbb E_{p(z, x)} \log q(z \mid x)

    Its minimum over all q is the posterior for every x that the model can make. It needs no gradient of the
    model and no reparameterized q, works for discrete latents and for latents that the guide leaves to the
    model, and q covers all modes. Data of the given arguments' shapes are drawn anew in each evaluation;
    what is given but not observed (covariates, sizes) stays. A guide that is not set up yet is set up with
    simulated data. Plates count as in the model. The model's
    parameters do not learn.

    Latents whose λ an ``AmortizedGuide`` has learned for one data set, not from an encoder, are drawn from
    the guide, and do not learn either.

    Args:
        num_simulations: how many data sets to draw in each evaluation.

    Raises:
        TypeError, ValueError: ``num_simulations`` is no positive int. When called, ValueError: simulated data
            cannot take the place of the real ones, no latent has an encoder, or the encoders do not see what
            is simulated.
        NotImplementedError: the model masks latents, so that they have no true values.

    Source: George Papamakarios, Iain Murray, "Fast ε-free Inference of Simulation Models with Bayesian
    Conditional Density Estimation", 2016, arXiv:1605.06376; Geoffrey E. Hinton et al., "The Wake-Sleep
    Algorithm for Unsupervised Neural Networks", 1995 (the sleep phase).

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_guides import AmortizedGuide, optim
        >>> from pyro_guides.objectives import ForwardKL
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AmortizedGuide(model), optim.Adam({"lr": 0.01}), ForwardKL())
        >>> losses = [svi.step(torch.zeros(20)) for _ in range(3)]
    """

    def __init__(self, num_simulations: int = 1) -> None:
        if isinstance(num_simulations, bool) or not isinstance(num_simulations, int):
            raise TypeError(f"num_simulations must be an int, got {num_simulations!r}")
        if num_simulations < 1:
            raise ValueError(f"num_simulations must be at least 1, got {num_simulations}")
        super().__init__()
        self.num_simulations = num_simulations
        self._checked: Guide | None = None

    def differentiable_loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        """The mean of minus log q over simulated data sets, with the gradient of the guide's parameters."""
        with Unweighed():
            return self._loss(model, guide, args, kwargs)

    def _loss(self, model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if isinstance(guide, AmortizedGuide) and not guide.is_set_up:
            _set_up(model, guide, args, kwargs)
        structure = _structure(model, guide, args, kwargs)
        indices = {name: p.indices for name, p in structure.plates.items() if p.indices is not None}
        held = _draws_of_learned(guide, structure, indices, args, kwargs)
        call = ModelCall(model, args, kwargs, indices)
        values = call.simulate({}, held, count=self.num_simulations).values
        data = {n: as_argument(structure, args, kwargs, n, values.get(n)) for n in structure.observed}
        self._check_reach(guide, structure, args, kwargs, data)
        latents = {name: value for name, value in values.items() if name not in data}
        loss = torch.zeros(())
        for at in range(self.num_simulations):
            seen = with_observations(structure, args, kwargs, {n: x[at] for n, x in data.items()})
            truth = {name: value[at] for name, value in latents.items()}
            loss = loss - _log_q(guide, {**indices, **held, **truth}, held, *seen)
        return loss / self.num_simulations

    def _check_reach(
        self,
        guide: Guide,
        structure: Structure,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: PerSite,
    ) -> None:
        """Look once whether the encoders see what is simulated."""
        if self._checked is guide or not isinstance(guide, AmortizedGuide):
            return
        sources = {encoding.source for part in guide.network.parts for encoding in part.encodings}
        check_reach(sources, structure, args, kwargs, {name: value[0] for name, value in data.items()})
        self._checked = guide


def _set_up(model: Model, guide: AmortizedGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the guide up with simulated data, so that its encoders standardize what they will see."""
    structure = read(model, args, kwargs, once=True)
    indices = {name: p.indices for name, p in structure.plates.items() if p.indices is not None}
    values = ModelCall(model, args, kwargs, indices).simulate({}, count=1).values
    data = {n: as_argument(structure, args, kwargs, n, values.get(n))[0] for n in structure.observed}
    seen = with_observations(structure, args, kwargs, data)
    guide.setup(*seen[0], **seen[1])


def _structure(model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    if isinstance(guide, AmortizedGuide):
        structure = guide._structure(args, kwargs, complete=True)
    else:
        structure = read(model, args, kwargs, once=True)
    masked = [
        name for name, latent in structure.latents.items() if (latent.mask, latent.inner_mask) != (None, None)
    ]
    if masked:
        raise NotImplementedError(
            f"the model masks the latents {masked}, and what is masked has no true value; pass arguments "
            "that mask none of them"
        )
    return structure


@torch.no_grad()
def _draws_of_learned(
    guide: Guide,
    structure: Structure,
    indices: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PerSite:
    """A draw of the latents whose λ was learned for this data set, which simulations teach nothing about.

    Raises:
        ValueError: all latents are such.
    """
    if not isinstance(guide, AmortizedGuide):
        return {}
    parts = guide.network.parts
    turns = take_turns([part.group for part in parts], structure)
    own = [(turn, name) for turn in turns for name in turn.group.sites if name in structure.latents]
    learned = [name for turn, name in own if not parts[turn.part].encodings]
    if len(learned) == len(own):
        raise ValueError(
            f"λ of {learned} is learned for one data set, so that simulations from the prior cannot be put "
            "through the guide; amortize it with an encoder, or take another objective"
        )
    if not learned:
        return {}
    with poutine.block():
        values = poutine.replay(guide, trace=_trace_of(indices))(*args, **kwargs)
    return {name: values[name] for name in learned}


def _log_q(
    guide: Guide, given: PerSite, held: PerSite, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Log q of the latents that a simulation started from.

    Raises:
        ValueError: the guide draws what the model does not.
    """
    replayed = poutine.replay(guide, trace=_trace_of(given))
    with frozen(guide, lambda part: not part.encodings):
        trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    total = torch.zeros(())
    for site in random_sites(trace):
        if site["name"] not in given:
            raise ValueError(
                f"the guide draws '{site['name']}', which the model does not, so that it has no true value; "
                "take a guide that draws the model's latents alone"
            )
        if site["name"] not in held:
            total = total + log_prob_of(site).sum()
    return total


def _trace_of(values: Mapping[str, Tensor]) -> Trace:
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, type="sample", name=name, is_observed=False, value=value, infer={})
    return trace
