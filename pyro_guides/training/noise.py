"""How noisy the gradients of a step are, and where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pyro_guides.guide import AmortizedGuide
from pyro_guides.objectives import differentiable_loss
from pyro_guides.statistics.arguments import count, whole
from pyro_guides.training import randomness
from pyro_guides.training.settings import check_elbo, check_functions
from pyro_guides.training.weights import Weights

__all__ = ["GradientNoise", "gradient_noise"]


@final
@dataclass(frozen=True)
class GradientNoise:
    """Signal and noise of the gradient of one step, for each group of parameters.

    Attributes:
        signal: the norm of the mean gradient, by group, bias removed; 0 where noise hides it.
        noise: the root mean square distance of a step's gradient from that mean.
        repeats: how many steps this is from.
    """

    signal: dict[str, float]
    noise: dict[str, float]
    repeats: int

    @property
    def ratio(self) -> dict[str, float]:
        """Signal over noise - of about how many steps' mean the noise is as large as the signal, squared."""
        signal = self.signal
        certain = {name: math.inf if signal[name] > 0.0 else 0.0 for name in signal}
        return {name: signal[name] / x if x > 0.0 else certain[name] for name, x in self.noise.items()}

    def __repr__(self) -> str:
        width = max(map(len, self.noise))
        head = f"{'gradient of':{width}}  {'signal':>9}  {'noise':>9}  {'ratio':>7}"
        lines = [
            f"{name:{width}}  {self.signal[name]:9.3g}  {self.noise[name]:9.3g}  {ratio:7.3g}"
            for name, ratio in self.ratio.items()
        ]
        return "\n".join([head, *lines])


def gradient_noise(
    elbo: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    repeats: int = 32,
    seed: int = 0,
    **kwargs: Any,
) -> GradientNoise:
    r"""Measure the gradient's noise at the weights as they are, for the same rows again and again.

    Of R gradients :math:`g_r` with mean :math:`\bar g`,

    .. math:: \text{noise}^2 = \frac{1}{R - 1} \sum_r \lVert g_r - \bar g \rVert^2, \qquad
        \text{signal}^2 = \lVert \bar g \rVert^2 - \text{noise}^2 / R

    Where the ratio is far below 0.1, more particles, an objective with less noise, or larger batches are
    worth their cost. Nothing is changed, no gradient is left behind.

    Args:
        elbo: an ELBO of Pyro or of :mod:`pyro_guides.objectives`.
        model: the model.
        guide: the guide.
        *args: the model's arguments.
        repeats: R, at least 2.
        seed: of the random numbers.
        **kwargs: the model's keyword arguments.

    Raises:
        TypeError, ValueError: an argument is not what it should be, or there is nothing to train.

    Source: Tom Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", 2018,
    arXiv:1802.04537 (signal-to-noise ratios of gradient estimators).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_guides import AmortizedGuide, gradient_noise
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> list(gradient_noise(Trace_ELBO(), model, AmortizedGuide(model), torch.randn(50)).ratio)
        ['encoder', "latents 'z'"]
    """
    check_functions(model, guide, None)
    check_elbo(elbo, "elbo")
    whole("seed", seed)
    count("repeats", repeats)
    if repeats < 2:
        raise ValueError("repeats must be at least 2, for one gradient shows no noise")
    with randomness.own_numbers(seed):
        if isinstance(guide, AmortizedGuide):
            guide.setup(*args, **kwargs)
        weights = Weights(model, guide, lambda: elbo.loss(model, guide, *args, **kwargs))
        parameters = list(weights.parameters.values())
        draws = []
        for _ in range(repeats):
            loss = differentiable_loss(elbo, model, guide, *args, **kwargs)
            draws.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    groups: dict[str, list[Tensor]] = {}
    for name, *found in zip(weights.parameters, *draws, strict=True):
        known = [gradient for gradient in found if gradient is not None]
        if known:
            groups.setdefault(_group(name, guide), []).append(torch.stack(known).reshape(len(known), -1))
    return _measured({name: torch.cat(parts, dim=-1).double() for name, parts in groups.items()}, repeats)


def _measured(gradients: dict[str, Tensor], repeats: int) -> GradientNoise:
    noise = {name: float(g.var(0).sum().sqrt()) for name, g in gradients.items()}
    squares = {
        name: float(g.mean(0).square().sum()) - noise[name] ** 2 / repeats for name, g in gradients.items()
    }
    signal = {name: math.sqrt(max(0.0, square)) for name, square in squares.items()}
    return GradientNoise(signal, noise, repeats)


def _group(name: str, guide: Callable[..., Any]) -> str:
    """What a parameter belongs to: an encoder, the λ of a group of latents, or a part of the model."""
    owner, _, rest = name.partition(".")
    if owner != "guide" or not isinstance(guide, AmortizedGuide):
        return f"{owner} {rest.replace('$$$', '.').partition('.')[0]}"
    kind, number = rest.removeprefix("network.").split(".")[:2]
    if kind == "encoders":
        return "encoder" if len(guide.network.encoders) == 1 else f"encoder {number}"
    return str(guide.network.parts[int(number)].group)
