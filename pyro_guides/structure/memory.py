"""Remembers the structures of a model that cannot change, and checks those that do."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, final

from torch import Tensor
from torch.distributions.constraints import Constraint, independent

from pyro_guides.structure.changes import signature
from pyro_guides.structure.dependencies import live_sites
from pyro_guides.structure.description import Latent, Structure
from pyro_guides.structure.numbering import numbered
from pyro_guides.structure.reading import read

__all__ = ["Memory"]

Model = Callable[..., Any]
_CAPACITY = 64


@final
class Memory:
    """What a guide knows of its model between calls.

    Args:
        model: the model.
        args: the arguments it was first read with.
        kwargs: the keyword arguments it was first read with.
        structure: the structure that was found.
        stems: beginnings of names that run on with a number; how many there are may differ from call to call.
        masked: the observed sites whose masks the encoders need, if they have some.
    """

    def __init__(
        self,
        model: Model,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        structure: Structure,
        stems: Collection[str] = (),
        masked: Collection[str] = (),
    ) -> None:
        self.stems = frozenset(stems)
        self._may_be_masked = frozenset(masked)
        self._masked: set[str] = set()  # those that were, and so must be met in every reading
        self.latents = tuple(structure.latents)
        self.observed = frozenset(structure.observed)
        # Encoders may read plates that no latent lies in, so that the sites that show them must be met, too.
        self._showing = {site for name in structure.plates for site in _shown_by(name, structure)}
        self._kinds = {self._title(name): _kind(latent) for name, latent in structure.latents.items()}
        self._has_met_model = True  # not so in a guide that was loaded: its model may be another one
        changeable = not all(latent.fixed for latent in structure.latents.values())
        several = len(self.latents) > 1
        self._live = live_sites(model, args, kwargs) if several and changeable else frozenset[str]()
        self._live_stems = {run[0] for run in map(numbered, self._live) if run is not None} & self.stems
        # None marks a signature whose structure may differ from call to call.
        self._known: OrderedDict[Hashable, Structure | None] = OrderedDict()
        self._remember(signature(model, args, kwargs), structure)

    def knows(self, name: str) -> bool:
        """Whether a site was a latent when the guide was set up, or goes on with its numbers."""
        run = numbered(name)
        return name in self.latents or (run is not None and run[0] in self.stems)

    def without_structures(self) -> Memory:
        """The same for a file: what was read is read, and the model compared with its latents, anew."""
        new = copy.copy(self)
        new._known = OrderedDict()
        new._has_met_model = False
        return new

    def is_live(self, name: str) -> bool:
        """Whether a latent's support, mask or scale is computed from other latents."""
        if not self._live:
            return False
        run = numbered(name)
        return name in self._live or (run is not None and run[0] in self._live_stems)

    def structure(
        self,
        model: Model | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        complete: bool = False,
    ) -> Structure:
        """The model's structure for these arguments, read again unless it is known to be static.

        Args:
            model: the model; None if only what is remembered can be had.
            args: its arguments.
            kwargs: its keyword arguments.
            complete: whether what lies behind the last latent is needed, too.

        Raises:
            RuntimeError: there is no model, and the structure is not known.
            ValueError: the latents are not those of the guide.
        """
        key = signature(model, args, kwargs)
        known = self._known.get(key) if key is not None else None
        if known is not None:
            return known
        model = require(model)
        new = key is not None and key not in self._known
        if complete or new:
            structure = read(model, args, kwargs, known=self.knows, once=not new)
            self._check(structure)
            self._remember(key, structure)
        else:
            structure = self.read_again(model, args, kwargs)
            self._check(structure)
        return structure

    def read_again(
        self,
        model: Model,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Mapping[str, Tensor] | None = None,
        *,
        indices: Mapping[str, Tensor] | None = None,
    ) -> Structure:
        """Read the model as far as the guide needs it, at given values and elements of plates."""
        until = None if self.stems else {*self.latents, *self._masked, *self._showing}
        return read(
            model, args, kwargs, given=given, indices=indices, until=until, known=self.knows, once=True
        )

    def _remember(self, key: Hashable | None, structure: Structure) -> None:
        sites = [structure.observed[name] for name in self._may_be_masked if name in structure.observed]
        masked = [site.name for site in sites if site.mask is not None]
        self._masked.update(masked)
        if key is None:
            return
        static = structure.static and not masked
        self._known[key] = structure.without_values() if static else None
        while len(self._known) > _CAPACITY:
            self._known.popitem(last=False)

    def _title(self, name: str) -> str:
        run = numbered(name)
        return run[0] if run is not None and run[0] in self.stems else name

    def _check(self, structure: Structure) -> None:
        if not self._has_met_model:
            self._meet(structure)
        if new := [name for name in structure.latents if not self.knows(name) and name not in self.observed]:
            raise ValueError(
                f"this call of the model samples the latents {new}, which were not there when the "
                "guide was set up; set it up with arguments that reach all latents"
            )

    def _meet(self, structure: Structure) -> None:
        """Compare the model with the one that the guide was set up for.

        Raises:
            ValueError: it has other latents, or the same in other plates or on other supports.
        """
        seen = {self._title(name): _kind(latent) for name, latent in structure.latents.items()}
        observed = {self._title(name) for name in structure.observed}
        differences = [
            *(f"'{name}' is missing" for name in self._kinds if name not in {*seen, *observed}),
            *(f"'{name}' is new" for name in seen if name not in self._kinds),
            *(
                f"'{name}' is {kind}, not {self._kinds[name]}"
                for name, kind in seen.items()
                if kind != self._kinds.get(name, kind)
            ),
        ]
        if differences:
            raise ValueError(
                "this is not the model that the guide was saved for, or this call does not reach all of its "
                f"latents, as the first call of a loaded guide must: {'; '.join(differences)}"
            )
        self._has_met_model = True


def _shown_by(plate: str, structure: Structure) -> list[str]:
    """The first observed site in a plate; none if latents lie in it."""
    if any(plate in latent.plates for latent in structure.latents.values()):
        return []
    return [name for name, site in structure.observed.items() if plate in site.plates][:1]


def _kind(latent: Latent) -> str:
    """What does not change from call to call: plates, event shape, and what kind of support."""
    shape, plates = tuple(latent.event_shape), list(latent.plates)
    return f"a {_support(latent.support)} of event shape {shape} in the plates {plates}"


def _support(support: Constraint) -> str:
    """The kind of a support, whatever its bounds."""
    while isinstance(support, independent):
        support = support.base_constraint
    return type(support).__name__.strip("_")


def require(model: Model | None) -> Model:
    """The model, which a guide that was loaded from a file may lack."""
    if model is None:
        raise RuntimeError(
            "this guide was loaded without its model, which it must read for new arguments: set "
            "guide.model = model"
        )
    return model
