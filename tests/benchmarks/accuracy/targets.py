"""What a guide is judged on: a model, its data, and what a long run of NUTS knows of its posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

__all__ = ["FLAT", "Draws", "Kind", "Known", "Ordered", "Target", "known", "scalars", "stored"]

FLAT = 1e6  # the scale of the normals that stand for flat priors, which Pyro cannot draw starts from

Kind = Literal["regression", "GLM", "hierarchy", "series", "bimodal"]
Draws = Mapping[str, Tensor]

_DATA = Path(__file__).parents[1] / "data" / "posteriors.npz"


@dataclass(frozen=True)
class Known:
    """The reference: each scalar's name, ``theta[1]`` being the first of the site ``theta``, and its moments.

    Attributes:
        names: of all scalars, in order.
        mean: their posterior means.
        sd: their standard deviations.
        mcse: the standard errors of these means.
    """

    names: list[str]
    mean: Tensor
    sd: Tensor
    mcse: Tensor


@dataclass(frozen=True)
class Target:
    """One posterior.

    Attributes:
        name: as in the source, shortened.
        kind: what is hard about it.
        model: an ordinary Pyro model, whose sites take extra dimensions on the left.
        data: its arguments.
        known: the reference.
        nesting: how many plates lie in each other.
        derived: what the reference has beside, or in place of, the sites.
        flipped: of a posterior with two modes, whether draws are in the second one.
    """

    name: str
    kind: Kind
    model: Callable[..., Any]
    data: tuple[Tensor, ...]
    known: Known
    nesting: int = 0
    derived: Callable[[Draws], Draws] | None = None
    flipped: Callable[[Draws], Tensor] | None = None


@cache
def _file() -> Mapping[str, np.ndarray]:
    with np.load(_DATA, allow_pickle=False) as file:
        return dict(file)


def stored(prefix: str) -> dict[str, Tensor]:
    """The data under a prefix, as float64; what is a whole number stays one in value only."""
    start = f"{prefix}."
    return {
        key.removeprefix(start): torch.as_tensor(array).double()
        for key, array in _file().items()
        if key.startswith(start)
    }


def known(name: str) -> Known:
    """The reference of that name."""
    file = _file()
    numbers = (torch.as_tensor(file[f"{name}.{what}"]).double() for what in ("mean", "sd", "mcse"))
    return Known(file[f"{name}.names"].tolist(), *numbers)


def scalars(target: Target, draws: Draws) -> Tensor:
    """Draws ``(S, ...)`` of all sites as ``(S, number of names)``, in the order of the reference.

    Raises:
        ValueError: the model has other scalars than the reference.
    """
    found = {**draws, **(target.derived(draws) if target.derived else {})}
    names: dict[str, list[str]] = {}
    for name in target.known.names:
        names.setdefault(name.split("[")[0], []).append(name)
    columns = []
    for site, members in names.items():
        flat = found[site].reshape(len(found[site]), -1)
        if flat.shape[-1] != len(members):
            raise ValueError(f"{target.name}: {site} is {flat.shape[-1]} scalars, not {len(members)}")
        columns += [flat[:, i] for i in range(len(members))]
    order = [name for members in names.values() for name in members]
    return torch.stack([columns[order.index(name)] for name in target.known.names], dim=-1)


class Ordered(dist.TorchDistribution):
    """Independent values, of which those in order are taken; the density lacks its constant.

    Args:
        base: of each value, ``(..., D)``.
        positive: whether they must be positive, too.
    """

    arg_constraints: Mapping[str, constraints.Constraint] = {}

    def __init__(self, base: dist.Normal, *, positive: bool = False) -> None:
        self.base, self.positive = base, positive
        super().__init__(base.batch_shape[:-1], base.batch_shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Vectors in order."""
        return constraints.positive_ordered_vector if self.positive else constraints.ordered_vector

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Ordered:
        """The same for a batch."""
        return Ordered(self.base.expand((*batch_shape, *self.event_shape)), positive=self.positive)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, folded and sorted, as a place to start from."""
        drawn = self.base.sample(sample_shape)
        return (drawn.abs() if self.positive else drawn).sort(-1).values

    def log_prob(self, value: Tensor) -> Tensor:
        """Of vectors in order."""
        return self.base.log_prob(value).sum(-1)
