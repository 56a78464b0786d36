"""What a posterior is asked for: a guide, its arguments, and values that are held.

Runs the guide for many draws side by side, and sums densities row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, final

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_guides.blocks import Blocks
from pyro_guides.encoding import Contexts, Encoding
from pyro_guides.refinement import Refinement
from pyro_guides.scoring import ModelCall
from pyro_guides.structure import Latent, Observed, Plate, Structure, dependencies
from pyro_guides.turns import Turn, take_turns

if TYPE_CHECKING:
    from pyro_guides.guide import AmortizedGuide

__all__ = ["Query"]

_DRAWS = "_posterior_draws"
_VALUES_PER_PASS = 500_000  # bounds the memory of one run; measured in latent values


@final
@dataclass(frozen=True, eq=False)
class Query:
    """A guide with the model's arguments, all rows that are at hand, and values that are held.

    Attributes:
        guide: the guide.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        structure: the model's structure, with all rows that are at hand.
        opened: the plates that the model subsamples by itself, as it opens them.
        held: values of upper latents, in natural shapes; draws of the others are taken given these.
        refinement: changes of λ for these rows.
        contexts: what the encoders return for these rows, filled by the first run; None if they are to be
            asked in each.
    """

    guide: AmortizedGuide
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    opened: Mapping[str, Plate]
    held: Mapping[str, Tensor] = field(default_factory=dict)
    refinement: Refinement | None = None
    contexts: dict[Encoding, Contexts] | None = None

    @classmethod
    def of(cls, guide: AmortizedGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Query:
        """The posterior of all latents.

        Raises:
            NotImplementedError: the model computes masks, scales or supports for its own subsample only.
        """
        structure = guide._structure(args, kwargs, complete=True)
        opened = {
            name: plate
            for name, plate in structure.plates.items()
            if plate.subsampled and not plate.chosen
            if _has_all_rows(guide, structure, plate, args, kwargs)
        }
        for latent in structure.latents.values():
            if opened.keys() & set(latent.plates) and not latent.even:
                raise NotImplementedError(
                    f"latent '{latent.name}' has a mask, scale or support that the model computes for its "
                    "own subsample only; use a model that takes the rows it is given whole"
                )
        return cls(guide, args, kwargs, structure.with_full_plates(opened), opened)

    # --- what is drawn, and what belongs to a row

    @property
    def latents(self) -> dict[str, Latent]:
        """The latents that are drawn: not those that are held, or left to the model."""
        others = {*self.held, *self.left_to_model}
        return {name: x for name, x in self.structure.latents.items() if name not in others}

    @cached_property
    def left_to_model(self) -> frozenset[str]:
        """Sites that were observed when the guide was set up, and that this call has no values of."""
        knows = self.guide._require_memory().knows
        return frozenset(name for name in self.structure.latents if not knows(name))

    def is_live(self, name: str) -> bool:
        """Whether the support of a latent differs from draw to draw."""
        return self.guide._require_memory().is_live(name)

    @cached_property
    def inner_plates(self) -> tuple[str, ...]:
        """The plates whose elements are independent given what lies outside, leftmost dimension first.

        Those of all amortized latents that have plates, of all latents if none is amortized.
        """
        parts = [p for p in self.guide.network.parts if set(p.group.plates) <= self.structure.plates.keys()]
        chosen = [part for part in parts if part.encodings and part.group.plates] or parts
        dims = set[int].intersection(*(set(part.local) for part in chosen))
        return tuple(p.name for p in self.structure.plates_of(self.structure.plates) if p.dim in dims)

    @cached_property
    def inner(self) -> set[str]:
        """The latents and observed sites inside of these plates."""
        own = set(self.inner_plates)
        sites: Mapping[str, Latent | Observed] = {**self.structure.latents, **self.structure.observed}
        return {name for name, site in sites.items() if own and own <= set(site.plates)}

    @cached_property
    def row_plates(self) -> tuple[str, ...]:
        """The plates whose elements are posteriors of their own: none if latents outside are drawn, too."""
        return self.inner_plates if self.inner and self.latents.keys() <= self.inner else ()

    @property
    def scored(self) -> set[str]:
        """The sites whose densities count."""
        return self.inner if self.row_plates else {*self.structure.latents, *self.structure.observed}

    @property
    def turns(self) -> list[Turn]:
        """The groups in the order of drawing, step by step."""
        return take_turns([part.group for part in self.guide.network.parts], self.structure)

    def holding(self, values: Mapping[str, Tensor]) -> Query:
        """The posterior of the other latents given these values."""
        return replace(self, held={**self.held, **values})

    def refined(self, refinement: Refinement) -> Query:
        """The same with changes of λ."""
        return replace(self, refinement=refinement)

    def remembering(self) -> Query:
        """The same with contexts that are computed once, without gradients."""
        query = replace(self, contexts={})
        with torch.no_grad():
            query.run(1)
        return query

    # --- runs of guide and model

    @cached_property
    def model(self) -> ModelCall:
        """The model with its arguments.

        Raises:
            NotImplementedError: the model subsamples several plates by itself.
        """
        indices = {n: p.indices for n, p in self.structure.plates.items() if p.indices is not None}
        if len(self.opened) > 1:
            raise NotImplementedError(
                f"the model subsamples {sorted(self.opened)} by itself, and all rows of one such plate can "
                "be scored, not of several; use a model that takes the rows it is given whole"
            )
        blocks = None
        for plate in self.opened.values():
            inside = [x for x in self.structure.latents.values() if plate.name in x.plates]
            blocks = Blocks(plate, {x.name: len(x.event_shape) for x in inside})
        return ModelCall(self.guide.model, self.args, self.kwargs, indices, blocks, self._unseen)

    @property
    def _unseen(self) -> frozenset[str]:
        """The sites left to the model that nothing depends on, so that they integrate to one."""
        if not self.left_to_model:
            return frozenset()
        children = dependencies(self.guide.model, self.args, self.kwargs).children
        return frozenset(name for name in self.left_to_model if not children.get(name))

    def run(self, count: int, values: Mapping[str, Tensor] | None = None) -> Trace:
        """Trace one run of the guide for ``count`` draws side by side.

        Args:
            count: S.
            values: values of latents to take instead of drawing them, ``(S or 1, *natural shape)``.
        """
        given = {**{name: value.unsqueeze(0) for name, value in self.held.items()}, **(values or {})}
        given = {name: self._aligned(name, value) for name, value in given.items()}
        guide = poutine.condition(self._sample, data=given) if given else self._sample
        draws = pyro.plate(_DRAWS, count, dim=-self.structure.depth - 1)
        with self.guide.network.evaluated(), poutine.block(), draws:
            return poutine.trace(guide).get_trace()

    def passes(self, count: int) -> Iterator[slice]:
        """Draws in portions that bound the memory of one run."""
        size = sum(math.prod(self.natural_shape(latent)) for latent in self.latents.values())
        most = max(1, _VALUES_PER_PASS // max(1, size))
        for start in range(0, count, most):
            yield slice(start, min(start + most, count))

    def draws_of(self, trace: Trace) -> dict[str, Tensor]:
        """What a run drew, ``(S, *natural shape)``."""
        return {
            name: cast("Tensor", trace.nodes[name]["value"]).reshape(-1, *self.natural_shape(latent))
            for name, latent in self.latents.items()
        }

    def log_q_of(self, trace: Trace, plates: Collection[str] | None = None) -> Tensor:
        """Log q of a run's draws, see :meth:`by_row`."""
        trace.compute_log_prob()
        return self.by_row({name: trace.nodes[name]["log_prob"] for name in self.latents}, plates)

    def by_row(self, log_probs: Mapping[str, Tensor], plates: Collection[str] | None = None) -> Tensor:
        """Log densities of each row, those of the row itself and not of the rows it stands for.

        Args:
            log_probs: scaled by site, as Pyro has them, ``(S, ..., *batch)``.
            plates: see :meth:`summed`.
        """
        return self.summed(log_probs, plates) / self.scale_of_row(plates)

    def summed(self, values: Mapping[str, Tensor], plates: Collection[str] | None = None) -> Tensor:
        """Values summed over sites, and over everything but the row plates, ``(S, *row plates)``.

        Args:
            values: by site, ``(S, ..., *batch)``; sites that do not count are left out.
            plates: the row plates, whose sites alone count; all do if there are none. By default
                :attr:`row_plates`.
        """
        depth = self.structure.depth
        kept = [p.dim for p in self.structure.plates_of(self.row_plates if plates is None else set(plates))]
        others = [dim for dim in range(-depth, 0) if dim not in kept]
        total = torch.zeros(())
        counted = self.inner if plates else self.scored
        for value in (value for name, value in values.items() if name in counted):
            batch = value.shape[1:]
            aligned = value.reshape(len(value), *[1] * (depth - len(batch)), *batch)
            total = total + (aligned.sum(others) if others else aligned)
        return total

    def scale_of_row(self, plates: Collection[str] | None = None) -> float:
        """How many times a row counts: by subsampled plates, and by a scale around all of its latents."""
        rows = self.structure.plates_of(self.row_plates if plates is None else set(plates))
        scale = math.prod(plate.scale for plate in rows)
        return scale * self._common_scale(self.inner if plates else self.scored)

    def _common_scale(self, names: Collection[str]) -> float:
        """The factor that a ``poutine.scale`` puts on all of some latents, and that q does not depend on."""
        scales = {n: torch.as_tensor(x.scale) for n, x in self.latents.items() if n in names}
        first = next(iter(scales.values()), torch.tensor(1.0))
        same = all(x.numel() == 1 and float(x) == float(first) for x in scales.values())
        return float(first) if same else 1.0

    def _sample(self) -> dict[str, Tensor]:
        call = self.guide._open(
            self.args,
            self.kwargs,
            structure=self.structure,
            refinement=self.refinement,
            contexts=self.contexts,
        )
        return call.sample()

    def place(self, pick: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Values without sampling, see ``Call.place``."""
        with torch.no_grad(), self.guide.network.evaluated(), poutine.block():
            call = self.guide._open(
                self.args, self.kwargs, structure=self.structure, refinement=self.refinement
            )
            return call.place(pick, self.held)

    def central_draw(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The draw closest to the centre, on unconstrained scales in units of their spread."""
        parts = [self.unconstrained(name, value) for name, value in draws.items()]
        u = torch.cat([part.reshape(len(part), -1) for part in parts], dim=-1)
        distance = ((u - u.mean(0)) / (u.std(0, correction=0) + 1e-12)).square().sum(-1)
        return {name: value[int(distance.argmin())] for name, value in draws.items()}

    # --- values and shapes

    def unconstrained(self, name: str, value: Tensor) -> Tensor:
        """Unconstrained values of a latent; the values themselves if its support differs between draws."""
        return value if self.is_live(name) else self.structure.latents[name].unconstrain(value)

    def checked(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A given value with a dimension for draws on the left."""
        latent = self.structure.latents[name]
        natural = self.natural_shape(latent)
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise TypeError(f"values of latents must be a dict of tensors by name, got a {kind}")
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
        return value if lead else value.unsqueeze(0)

    def natural_shape(self, latent: Latent) -> torch.Size:
        """The shape that a latent has in the model itself."""
        return self.structure.batch_shape(latent.plates) + latent.event_shape

    def rows_in(self, dims: int, plates: Collection[str], event_dim: int = 0) -> list[int]:
        """A shape of so many dimensions with the rows where their plates are, and ones elsewhere."""
        shape = [1] * dims
        for plate in self.structure.plates_of(plates):
            shape[plate.dim - event_dim] = plate.batch
        return shape

    def single(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A given value of one draw, in its natural shape."""
        value = self.checked(name, values)
        if len(value) > 1:
            raise ValueError(f"there are {len(value)} draws of '{name}'; give one value")
        return value[0]

    def _aligned(self, name: str, value: Tensor) -> Tensor:
        """A value ``(S, *natural shape)`` with the draws in front of all plate dimensions."""
        latent = self.structure.latents[name]
        natural = self.natural_shape(latent)
        gap = (1,) * (self.structure.depth - len(natural) + len(latent.event_shape))
        return value.reshape(len(value), *gap, *natural)


def _has_all_rows(
    guide: AmortizedGuide,
    structure: Structure,
    plate: Plate,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Whether λ of every latent in the plate, or else the data, are to be had for every element."""
    if not any(plate.name in latent.plates for latent in structure.latents.values()):
        seen = [site for site in structure.observed.values() if plate.name in site.plates]
        return all(site.argument is None for site in seen)  # an argument that is observed holds a batch
    sources = {part.encodings[0].source for part in guide.network.parts if part.encodings}
    return all(
        source.size(plate.name, args, kwargs) == plate.size
        for source in sources
        if plate.name in source.plates and not source.ragged
    )
