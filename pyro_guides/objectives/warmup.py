"""Weights of the KL term that change from step to step, so that latents are not given up early."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, final

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops.provenance import detach_provenance

from pyro_guides.distributions.sites import SiteDistribution
from pyro_guides.objectives.tempering import Tempering

__all__ = ["CyclicalWarmup", "FreeBits", "LinearWarmup", "kl_weight"]


def kl_weight(weight: float | Mapping[str, float]) -> Tempering:
    r"""Multiplies the KL term by a constant β, as in a β-VAE, for all that is run inside.

    Args:
        weight: β in [0, 1] or above; or a dict of them by the name of a latent, or of a plate for all latents
            inside that have none themselves; the other latents keep the weight one.

    Raises:
        TypeError, ValueError: a weight is not a finite number of at least 0.
        ValueError: when closed, a name is neither a latent nor a plate; when run, latents that are drawn
            jointly have different weights.

    Source: Irina Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational
    Framework", 2017.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_guides import AmortizedGuide, optim
        >>> from pyro_guides.objectives import kl_weight
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AmortizedGuide(model), optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> with kl_weight(0.3):
        ...     loss = svi.step(torch.randn(5))
    """
    if isinstance(weight, Mapping):
        if not weight:
            raise ValueError("weight names no latents: give a number for all, or a dict that is not empty")
        return _Fixed({name: _number("weight", value, 0.0) for name, value in weight.items()})
    return _Fixed(_number("weight", weight, 0.0))


@final
class _Fixed(Tempering):
    """Constant weights, by name or for all."""

    def __init__(self, weights: float | Mapping[str, float]) -> None:
        super().__init__(weights if isinstance(weights, Mapping) else None)
        self.weights = weights

    def weight_of(self, msg: Any, name: str | None) -> float:
        return self.weights if isinstance(self.weights, float) else self.weights[name or ""]


class _Schedule(Tempering):
    """One weight for all latents that it concerns, a function of the step."""

    @property
    @abstractmethod
    def weight(self) -> float:
        """The weight at this step."""

    def weight_of(self, msg: Any, name: str | None) -> float:
        return self.weight


@final
class LinearWarmup(_Schedule):
    r"""A KL weight that grows in a straight line to one: β = start + (1 - start) min(1, t / steps).

    Put it around each step; every time it is closed, t grows by one.

    Args:
        steps: how many steps it takes.
        start: the weight of the first step, in [0, 1].
        only: the names of latents, or of plates for all latents inside; all latents if None.

    Raises:
        TypeError, ValueError: an argument is not what it should be. When run, see :func:`kl_weight`.

    Source: Samuel R. Bowman et al., "Generating Sentences from a Continuous Space", 2016, arXiv:1511.06349;
    Casper Kaae Sønderby et al., "Ladder Variational Autoencoders", 2016, arXiv:1602.02282.

    Example:
        >>> from pyro_guides.objectives import LinearWarmup
        >>> warmup = LinearWarmup(4)
        >>> weights = []
        >>> for _ in range(6):
        ...     with warmup:  # and in it, svi.step(x)
        ...         weights.append(warmup.weight)
        >>> weights
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __init__(self, steps: int, *, start: float = 0.0, only: Collection[str] | None = None) -> None:
        super().__init__(only)
        self.steps = _count("steps", steps)
        self.start = _number("start", start, 0.0, 1.0)

    @property
    def weight(self) -> float:
        return self.start + (1.0 - self.start) * min(1.0, self.step / self.steps)


@final
class CyclicalWarmup(_Schedule):
    r"""A KL weight that grows to one and falls back, cycle after cycle.

    Each cycle begins as :class:`LinearWarmup`, over the share ``ramp`` of its steps, and stays at one for the
    others.

    Args:
        period: how many steps a cycle has.
        ramp: the share of its steps over which the weight grows, in (0, 1].
        start: the weight of a cycle's first step, in [0, 1].
        cycles: how many cycles there are; the weight is one behind the last. They never end if None.
        only: the names of latents, or of plates for all latents inside; all latents if None.

    Raises:
        TypeError, ValueError: an argument is not what it should be. When run, see :func:`kl_weight`.

    Source: Hao Fu et al., "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing", 2019,
    arXiv:1903.10145.

    Example:
        >>> from pyro_guides.objectives import CyclicalWarmup
        >>> warmup = CyclicalWarmup(4, cycles=2)
        >>> weights = []
        >>> for _ in range(10):
        ...     with warmup:
        ...         weights.append(warmup.weight)
        >>> weights
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        period: int,
        *,
        ramp: float = 0.5,
        start: float = 0.0,
        cycles: int | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        super().__init__(only)
        self.period = _count("period", period)
        self.ramp = _number("ramp", ramp, 0.0, 1.0)
        if self.ramp == 0.0:
            raise ValueError("ramp must be above 0, got 0; with no growth there is nothing to schedule")
        self.start = _number("start", start, 0.0, 1.0)
        self.cycles = None if cycles is None else _count("cycles", cycles)

    @property
    def weight(self) -> float:
        cycle, at = divmod(self.step, self.period)
        if self.cycles is not None and cycle >= self.cycles:
            return 1.0
        return self.start + (1.0 - self.start) * min(1.0, at / (self.ramp * self.period))


@final
class FreeBits(Tempering):
    r"""Leaves each group of latents some nats of KL that cost nothing, per row.

    What is optimized is :math:`\log p(x \mid z) - \sum_j \max(\lambda, \mathrm{KL}_j)`, KL being a
    running mean: the weight of a group's KL term is zero while it is below λ, and one above. The groups are
    those that an ``AmortizedGuide`` draws jointly; of other guides, each latent by itself. A row is one
    element of a group's plates.

    Args:
        nats: λ.
        decay: how much of the running mean a new step leaves, in [0, 1).
        only: the names of latents, or of plates for all latents inside; all latents if None.

    Attributes:
        kl: the running mean of each group's KL per row, by the names of its latents.

    Raises:
        TypeError, ValueError: an argument is not what it should be. When run, see :func:`kl_weight`.
        NotImplementedError: a latent is enumerated, so that there are no draws to measure its KL with.

    Source: Diederik P. Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow",
    2016, arXiv:1606.04934.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_guides import AmortizedGuide, optim
        >>> from pyro_guides.objectives import FreeBits
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AmortizedGuide(model), optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> free = FreeBits(0.5)
        >>> for _ in range(3):
        ...     with free:
        ...         loss = svi.step(torch.randn(5))
        >>> list(free.kl)
        ['z']
    """

    def __init__(self, nats: float, *, decay: float = 0.9, only: Collection[str] | None = None) -> None:
        super().__init__(only)
        self.nats = _number("nats", nats, 0.0)
        self.decay = _number("decay", decay, 0.0, 1.0)
        if self.decay == 1.0:
            raise ValueError("decay must be below 1, got 1, with which nothing new would count")
        self.kl: dict[str, float] = {}
        self._groups: dict[str, str] = {}
        self._masks: dict[str, Any] = {}
        self._seen: dict[tuple[str, bool], list[float]] = {}

    def weight_of(self, msg: Any, name: str | None) -> float:
        return 0.0 if self.kl.get(self._group(msg), math.inf) < self.nats else 1.0

    def state_dict(self) -> dict[str, float]:
        return {**super().state_dict(), **{f"kl:{group}": kl for group, kl in self.kl.items()}}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.kl = {key[3:]: float(value) for key, value in state.items() if key.startswith("kl:")}

    def __enter__(self) -> FreeBits:
        self._seen.clear()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._update()
        super().__exit__(*error)

    def _process_message(self, msg: Any) -> None:
        self._masks[msg["name"]] = msg["mask"]  # before a weight of zero hides what is to be measured
        super()._process_message(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not self.concerns(msg):
            return
        if msg["infer"].get("_enumerate_dim") is not None:
            raise NotImplementedError(
                f"FreeBits measures the KL of draws, but latent '{msg['name']}' is enumerated; take "
                "LinearWarmup"
            )
        self._group(msg)
        mask = self._masks[msg["name"]]
        with torch.no_grad():
            log_prob = detach_provenance(msg["fn"].log_prob(msg["value"]))
            shape = log_prob.shape
            counted = log_prob.numel() if mask is None else int(torch.as_tensor(mask).expand(shape).sum())
            mean = float(scale_and_mask(log_prob, mask=mask).sum()) / max(1, counted)
        self._seen.setdefault((msg["name"], self.is_in_model(msg)), []).append(mean)

    def _group(self, msg: Any) -> str:
        """The name of the group that a latent was drawn with."""
        if not self.is_in_model(msg):
            joint = isinstance(msg["fn"], SiteDistribution)
            self._groups[msg["name"]] = ", ".join(msg["fn"].joint.bounds) if joint else msg["name"]
        return self._groups.get(msg["name"], msg["name"])

    def _update(self) -> None:
        """Take what was measured since it was opened into the running means."""
        found: dict[str, float] = {}
        for (name, in_model), means in self._seen.items():
            group, mean = self._groups.get(name, name), sum(means) / len(means)
            found[group] = found.get(group, 0.0) + (-mean if in_model else mean)
        for group, kl in found.items():
            if math.isfinite(kl):
                known = self.kl.get(group, kl)
                self.kl[group] = self.decay * known + (1.0 - self.decay) * kl


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not (least <= number <= most and math.isfinite(number)):
        limits = f"at least {least}" if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {limits} and finite, got {value!r}")
    return number
