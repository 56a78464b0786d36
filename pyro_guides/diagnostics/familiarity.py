"""Are rows like those of training? Where they are not, an encoder answers without having learned to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from pyro_guides.posterior.query import Query
from pyro_guides.structure import Plate

if TYPE_CHECKING:
    from pyro_guides.guide import AmortizedGuide

__all__ = ["Familiarity"]

_FEWEST, _MOST = 50, 4000  # rows of training
_ROWS_AT_ONCE = 4096  # bounds the memory of distances
_LEAST_SPREAD = 1e-3  # relative to the mean one: rounding is not to look like a feature


@final
class Familiarity:
    r"""Tells rows that lie outside of what an encoder was trained on.

    Half of the training rows say what is near, the other half how far rows are that belong. The distance d
    is that of a row's context, what the encoders return for it, to the nearest of the first half, in
    standard deviations of each element. A p-value is the share of the second half that is as far:

    .. math:: p = \frac{1 + \#\{j \le n : d_j \ge d\}}{1 + n}

    Of rows that are exchangeable with those of training, a share of at most α has :math:`p \le \alpha`, as
    long as the encoder did not learn its training rows by heart: rows that were held out of training are
    better here, if there are some. p-values of the training rows themselves say nothing.

    Contexts keep what was useful in training, so what the encoder is blind to is not found. Distance to the
    nearest rows finds more than distance to their mean: training rows may come in clusters.

    Args:
        guide: the trained guide.
        *args: the model's arguments, with rows as they were in training, at least 50; to get p-values below
            0.01, 200. Of more than 4,000 a random choice is used, the same one every time.
        **kwargs: the model's keyword arguments.

    Shapes: p-values ``(*rows)``, one for each element of the plates that all amortized latents are in.
    Contexts of plates within a row count with their mean.

    Raises:
        ValueError: the guide has no encoder or reads a data set as a whole, or there are fewer than 50 rows.
        RuntimeError: the guide is not set up.

    Source: Harris Papadopoulos et al., "Inductive Confidence Machines for Regression", 2002, ECML (p-values
    from a split); Yiyou Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", 2022,
    arXiv:2204.06507.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide, Familiarity
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(400)
        >>> familiarity = Familiarity(AmortizedGuide(model).setup(x), x)
        >>> familiarity.p_values(torch.tensor([0.0, 20.0])) < 0.01
        tensor([False,  True])
    """

    def __init__(self, guide: AmortizedGuide, *args: Any, **kwargs: Any) -> None:
        if isinstance(guide, type) or not hasattr(guide, "is_set_up"):
            kind = type(guide).__name__
            raise TypeError(f"Familiarity(guide, *args) takes an AmortizedGuide, got a {kind}")
        rows = _contexts(guide, args, kwargs)
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) < _FEWEST:
            raise ValueError(
                f"at least {_FEWEST} training rows are needed, half of them to compare with and half to "
                f"calibrate p-values, got {len(rows)}; pass all rows of training at once"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MOST]
        near, belonging = rows[order.to(rows.device)].tensor_split(2)
        spread = near.std(0)
        self._guide = guide
        self._scale = spread + _LEAST_SPREAD * spread.mean() + torch.finfo(rows.dtype).tiny
        self._near = near / self._scale
        self._distances = self._distance(belonging).sort().values
        self._encoders = _fingerprint(guide)

    def __repr__(self) -> str:
        return f"Familiarity({len(self._near) + len(self._distances)} rows of training)"

    def knows(self, guide: AmortizedGuide) -> bool:
        """Whether a guide has the encoders that these rows were read by."""
        return _fingerprint(guide) == self._encoders

    def p_values(self, *args: Any, **kwargs: Any) -> Tensor:
        """How likely a row like those of training is to be this far from them, ``(*rows)``.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Raises:
            ValueError: the encoders have been trained since.
        """
        if not self.knows(self._guide):
            raise ValueError(
                "the encoder has been trained since, and its contexts have changed; make a new Familiarity"
            )
        rows = _contexts(self._guide, args, kwargs)
        distance = self._distance(rows.reshape(-1, rows.shape[-1]))
        nearer = torch.searchsorted(self._distances, distance)
        count = len(self._distances)
        return ((1 + count - nearer).to(rows.dtype) / (1 + count)).reshape(rows.shape[:-1])

    def _distance(self, rows: Tensor) -> Tensor:
        """How far rows are from the nearest of the first half, ``(B,)``."""
        parts = (rows / self._scale).split(_ROWS_AT_ONCE)
        return torch.cat([torch.cdist(part, self._near).amin(-1) for part in parts])


def _contexts(guide: AmortizedGuide, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What the encoders say of each row, side by side, ``(*rows, C)``."""
    query = Query.of(guide, args, dict(kwargs))
    encodings = {encoding for part in guide.network.parts for encoding in part.encodings}
    if not encodings:
        raise ValueError(
            "the guide has no encoder: λ was learned for this one data set, and there is nothing to be "
            "familiar with; amortize it with an encoder"
        )
    plates = query.structure.plates_of(query.inner_plates)
    if not plates:
        raise ValueError(
            "no plate keeps apart rows that are encoded one by one, so the data set as a whole is a single "
            "row, and there are no others to compare it with"
        )
    with torch.random.fork_rng():  # the run that asks the encoders draws latents, too
        found = query.remembering().contexts or {}
    inside = [encoding for encoding in found if set(query.inner_plates) <= set(encoding.plates)]
    return torch.cat([_by_row(found[encoding].at(None), plates) for encoding in inside], dim=-1)


def _by_row(values: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Contexts ``(*batch, C)`` with the rows' plates alone: ``(*rows, C)``."""
    others = [dim for dim in range(1 - values.dim(), 0) if dim not in {plate.dim for plate in plates}]
    return values.mean([dim - 1 for dim in others]) if others else values


def _fingerprint(guide: AmortizedGuide) -> tuple[float, ...]:
    """What changes whenever an encoder learns."""
    return tuple(float(value.double().sum()) for value in guide.network.encoders.state_dict().values())
