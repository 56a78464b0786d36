"""The posterior of given rows: draws, their densities, and what they say about each latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, final

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_guides.distributions.transforms import strip_independent
from pyro_guides.scoring import Scores, score_model
from pyro_guides.structure import Latent, Observed, Plate, Structure

if TYPE_CHECKING:
    from pyro_guides.guide import AmortizedGuide

__all__ = ["Posterior"]

_DRAWS = "_posterior_draws"
_VALUES_PER_PASS = 2_000_000  # bounds the memory of one pass; measured in latent values


@final
class Posterior:
    """Draws from q(z | x) for given rows, with log q and log p of each draw.

    Made by ``guide.posterior(...)``. Draws are taken once, when first asked for, and kept; log q and log p
    belong to them. Nothing here carries gradients.

    Where every site of the model lies inside common plates (a row each, no shared latents), densities are
    *per row*, and free of the model's subsampling scale: log p of the row, not of the rows it stands for.
    Otherwise they are joint, with that scale.

    Args:
        guide: the guide.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        num_draws: S, how many draws to take.

    Raises:
        ValueError: ``num_draws`` is less than 1.
    """

    def __init__(
        self,
        guide: AmortizedGuide,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        num_draws: int = 1000,
    ) -> None:
        if isinstance(num_draws, bool) or not isinstance(num_draws, int):
            raise TypeError(f"num_draws must be an int, got {num_draws!r}")
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {num_draws}")
        self.guide = guide
        self.args = args
        self.kwargs = kwargs
        self.num_draws = num_draws
        self.structure, self._completed = self._with_all_rows()

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name}: {tuple(self._natural_shape(latent))}" for name, latent in self.structure.latents.items()
        )
        return f"Posterior({self.num_draws} draws of {shapes})"

    @property
    def row_plates(self) -> tuple[str, ...]:
        """The plates that every latent and every observed site lies in, leftmost dimension first."""
        sites: list[Latent | Observed] = [*self.structure.latents.values()]
        sites += self.structure.observed.values()
        common = set.intersection(*(set(site.plates) for site in sites))
        return tuple(plate.name for plate in self.structure.plates_of(common))

    @property
    def draws(self) -> dict[str, Tensor]:
        """Draws by site, ``(S, *natural shape)``: the shape the site has in the model itself."""
        return self._guide_pass[0]

    @property
    def log_q(self) -> Tensor:
        """Log q of each draw, ``(S, *row plates)``."""
        return self._guide_pass[1]

    @property
    def log_p(self) -> Tensor:
        """Log p(x, z) of each draw under the model, ``(S, *row plates)``.

        Raises:
            NotImplementedError: the model draws other latents itself, or subsamples rows by itself.
        """
        return self._reduced(self._scores.log_prob.values())

    @property
    def log_likelihood(self) -> dict[str, Tensor]:
        """Log p of each observed site's elements, ``(S, *natural batch shape)``, unscaled."""
        return self._scores.likelihood

    @property
    def observed(self) -> dict[str, Tensor]:
        """The values of the observed sites."""
        return self._scores.observed

    def mean(self) -> dict[str, Tensor]:
        """The mean of the draws of each latent, in its natural shape."""
        return {name: _floating(draws).mean(0) for name, draws in self.draws.items()}

    def sd(self) -> dict[str, Tensor]:
        """The standard deviation of the draws of each latent, in its natural shape."""
        if self.num_draws < 2:
            raise ValueError("a standard deviation needs at least 2 draws; ask for more num_draws")
        return {name: _floating(draws).std(0) for name, draws in self.draws.items()}

    def median(self) -> dict[str, Tensor]:
        """The median of each latent, in its natural shape; see ``AmortizedGuide.median``."""
        network = self.guide.network
        if all(network.family(index).has_quantiles for index in range(len(network.parts))):
            return self._place(torch.tensor(0.5))
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    def quantiles(self, probabilities: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """Marginal quantiles of each latent, ``(len(probabilities), *natural shape)``.

        In closed form where q is normal, depends on nothing upstream and reaches the support by an
        increasing function of each value; from the draws otherwise.

        Raises:
            ValueError: a probability is not between 0 and 1.
        """
        levels = torch.as_tensor(probabilities, dtype=torch.float64)
        if levels.dim() != 1 or not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles must be a list of numbers from 0 to 1, got {probabilities}")
        if not self._has_closed_quantiles():
            return {n: _quantiles(x, levels) for n, x in self.draws.items()}
        placed = [self._place(level) for level in levels]
        return {name: torch.stack([values[name] for values in placed]) for name in placed[0]}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Exact log q of given values of all latents, ``(*row plates)`` or ``(S, *row plates)``.

        Args:
            values: by site, in natural shapes, or with one more dimension of draws on the left.

        Raises:
            ValueError: a latent's value is missing, has another shape, or lies outside its support.
        """
        if unknown := [name for name in values if name not in self.structure.latents]:
            raise ValueError(f"there are no latents {unknown}; they are {list(self.structure.latents)}")
        given = {name: self._widened(name, values) for name in self.structure.latents}
        counts = {name: len(value) for name, value in given.items()}
        count = max(counts.values())
        if any(other not in (1, count) for other in counts.values()):
            raise ValueError(f"the values hold different numbers of draws: {counts}")
        trace = self._trace(poutine.condition(self._run_guide, data=given), count)
        log_q = self._log_q_of(trace)
        batched = any(
            values[name].dim() > len(self._natural_shape(latent))
            for name, latent in self.structure.latents.items()
        )
        return log_q if batched else log_q.squeeze(0)

    def to_numpy(self) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]], dict[str, Any]]:
        """All that ArviZ takes, see :func:`pyro_guides.to_arviz`.

        Returns:
            NumPy arrays by group and variable, with dimensions ``(chain=1, draw=S, ...)`` except for
            observed data; the plates of each variable; and attributes.
        """
        sites: dict[str, Latent | Observed] = {**self.structure.latents, **self.structure.observed}
        dims = {name: list(site.plates) for name, site in sites.items()}
        dims |= {"lp": list(self.row_plates), "log_q": list(self.row_plates)}
        drawn = {
            "posterior": {n: self._squeezed(n, x, 1) for n, x in self.draws.items()},
            "log_likelihood": {n: self._squeezed(n, x, 1) for n, x in self.log_likelihood.items()},
            "sample_stats": {"lp": self.log_p, "log_q": self.log_q},
        }
        groups = {
            group: {name: x.numpy(force=True)[None] for name, x in values.items()}
            for group, values in drawn.items()
        }
        observed = {n: self._squeezed(n, x, 0) for n, x in self.observed.items()}
        groups["observed_data"] = {name: x.numpy(force=True) for name, x in observed.items()}
        attrs = {
            "inference_library": "pyro_guides",
            "families": ", ".join(type(f).__name__ for f in self.guide.families),
        }
        return groups, dims, attrs

    # --- passes over guide and model

    def _with_all_rows(self) -> tuple[Structure, set[str]]:
        """The structure with all rows that are at hand, and the plates that the model subsamples."""
        structure = self.guide._structure(self.args, self.kwargs, complete=True)
        full = {
            name
            for name, plate in structure.plates.items()
            if plate.subsampled and not plate.chosen and self._has_all_rows(plate)
        }
        for latent in structure.latents.values():
            if full & set(latent.plates) and not latent.fixed:
                raise NotImplementedError(
                    f"latent '{latent.name}' has a mask, scale or support that the model computes for its "
                    "own subsample only; use a model that takes the rows it is given whole"
                )
        return structure.with_full_plates(full), full

    def _has_all_rows(self, plate: Plate) -> bool:
        """Whether λ of every latent in the plate is to be had for every element."""
        sources = {part.encodings[0].source for part in self.guide.network.parts if part.encodings}
        return all(
            source.size(plate.name, self.args, self.kwargs) == plate.size
            for source in sources
            if plate.name in source.plates and not source.ragged
        )

    @cached_property
    def _guide_pass(self) -> tuple[dict[str, Tensor], Tensor]:
        size = sum(math.prod(self._natural_shape(x)) for x in self.structure.latents.values())
        most = max(1, _VALUES_PER_PASS // max(1, size))
        counts = [min(most, self.num_draws - i) for i in range(0, self.num_draws, most)]
        traces = [self._trace(self._run_guide, count) for count in counts]
        draws = {}
        for name, latent in self.structure.latents.items():
            shape = self._natural_shape(latent)
            draws[name] = torch.cat([_value(trace, name).reshape(-1, *shape) for trace in traces])
        return draws, torch.cat([self._log_q_of(trace) for trace in traces])

    @cached_property
    def _scores(self) -> Scores:
        if self._completed:
            raise NotImplementedError(
                f"the model subsamples {sorted(self._completed)} by itself, so it cannot score all rows "
                "at once; use a model that takes the rows it is given whole"
            )
        indices = {n: p.indices for n, p in self.structure.plates.items() if p.indices is not None}
        return score_model(self.guide.model, self.args, self.kwargs, self.draws, indices)

    def _run_guide(self) -> dict[str, Tensor]:
        return self.guide._open(self.args, self.kwargs, structure=self.structure).sample()

    def _trace(self, run: Callable[[], Any], count: int) -> Trace:
        """Trace one run of the guide for ``count`` draws side by side, and score it."""
        depth = self.structure.depth
        with torch.no_grad(), poutine.block(), pyro.plate(_DRAWS, count, dim=-depth - 1):
            trace = poutine.trace(run).get_trace()
            trace.compute_log_prob()
        return trace

    def _log_q_of(self, trace: Trace) -> Tensor:
        return self._reduced(trace.nodes[name]["log_prob"] for name in self.structure.latents)

    def _reduced(self, log_probs: Iterable[Tensor]) -> Tensor:
        """Log density per draw and row: the sum over sites and over everything but row plates."""
        depth = self.structure.depth
        rows = self.structure.plates_of(self.row_plates)
        kept = [plate.dim for plate in rows]
        summed = [dim for dim in range(-depth, 0) if dim not in kept]
        total = torch.zeros(())
        for log_prob in log_probs:
            batch = log_prob.shape[1:]
            aligned = log_prob.reshape(len(log_prob), *[1] * (depth - len(batch)), *batch)
            total = total + (aligned.sum(summed) if summed else aligned)
        for plate in rows:  # a row's own density, not that of the rows it stands for
            total = total / plate.scale
        return total

    # --- shapes and closed forms

    def _natural_shape(self, latent: Latent) -> torch.Size:
        return self.structure.batch_shape(latent.plates) + latent.event_shape

    def _squeezed(self, name: str, x: Tensor, start: int) -> Tensor:
        """Drop the dimensions between a site's plates, which have size 1 and no name."""
        sites: dict[str, Latent | Observed] = {**self.structure.latents, **self.structure.observed}
        plates = self.structure.plates_of(sites[name].plates)
        batch = self.structure.batch_shape(sites[name].plates)
        if x.shape[start : start + len(batch)] != batch:
            return x  # an observation that broadcasts over its plates
        kept = [plate.batch for plate in plates]
        return x.reshape(*x.shape[:start], *kept, *x.shape[start + len(batch) :])

    def _widened(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A given value with a dimension for draws in front of all plate dimensions."""
        latent = self.structure.latents[name]
        natural = self._natural_shape(latent)
        if name not in values:
            raise ValueError(f"values for all latents are needed, but '{name}' is missing")
        value = values[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"the value of '{name}' must be a tensor, got a {type(value).__name__}")
        lead = value.shape[: value.dim() - len(natural)]
        if len(lead) > 1 or value.shape != lead + natural:
            raise ValueError(
                f"the value of '{name}' has shape {tuple(value.shape)}, expected {tuple(natural)} or "
                f"(S, {', '.join(map(str, natural))})"
            )
        if latent.fixed and not bool(latent.support.check(value).all()):
            raise ValueError(f"the value of '{name}' lies outside its support {latent.support}")
        batch = self.structure.batch_shape(latent.plates)
        gap = (1,) * (self.structure.depth - len(batch))
        return value.reshape(*(lead or (1,)), *gap, *natural)

    @torch.no_grad()
    def _place(self, level: Tensor) -> dict[str, Tensor]:
        with poutine.block():
            call = self.guide._open(self.args, self.kwargs, structure=self.structure)
            return call.place(lambda q: q.quantile(level.to(q.mean)))

    def _has_closed_quantiles(self) -> bool:
        network = self.guide.network
        return all(
            not part.upstream and network.family(index).has_quantiles
            for index, part in enumerate(network.parts)
        ) and all(map(_is_increasing, self.structure.latents.values()))


def _floating(draws: Tensor) -> Tensor:
    return draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())


def _quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    """Empirical quantiles; of discrete values those that occur."""
    how = "linear" if draws.is_floating_point() else "nearest"
    values = _floating(draws)
    return torch.quantile(values, levels.to(values), dim=0, interpolation=how).to(draws.dtype)


def _value(trace: Trace, name: str) -> Tensor:
    return cast("Tensor", trace.nodes[name]["value"])


def _is_increasing(latent: Latent) -> bool:
    """Whether each value is an increasing function of one unconstrained value."""
    transform = strip_independent(latent.require_transform())
    try:
        return transform.codomain.event_dim == 0 and transform.sign == 1
    except NotImplementedError:
        return False
