"""One call of a guide: from the encoders' contexts to a ``pyro.sample`` per latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast, final

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_guides.distributions import Joint, VectorDistribution
from pyro_guides.distributions.sites import joined
from pyro_guides.groups import Group, Masks, masks, piece
from pyro_guides.network import Network, encode
from pyro_guides.plates import subsample_indices
from pyro_guides.structure import Structure, is_one

__all__ = ["Call"]


@final
class Call:
    """What one call of a guide knows: the model's structure now, open plates, values so far.

    Args:
        network: the guide's network.
        structure: the model's structure in this call.
        plates: the guide's plates, by name.
        args: arguments that hold the encoders' inputs.
        kwargs: keyword arguments that hold them.
        live: the latents whose support, mask or scale depends on other latents.
        reread: reads the model's structure again, given values of latents.
        simulated: whether the arguments hold data that the model has drawn.
    """

    def __init__(
        self,
        network: Network,
        structure: Structure,
        plates: Mapping[str, pyro.plate],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        live: frozenset[str],
        reread: Callable[[Mapping[str, Tensor]], Structure],
        simulated: bool = False,
    ) -> None:
        self.network = network
        self.structure = structure
        self.plates = plates
        self.indices = subsample_indices(plates)
        self.args = args
        self.kwargs = kwargs
        self.live = live
        self.reread = reread
        self.simulated = simulated
        self.values: dict[str, Tensor] = {}
        self.unconstrained: list[Tensor] = []
        self._joints: list[list[Joint]] = []
        self._contexts: dict[tuple[int, int], Tensor] = {}

    def sample(self) -> dict[str, Tensor]:
        """Run one ``pyro.sample`` per latent, group by group; their values by name."""
        for index, part in enumerate(self.network.parts):
            found = self._masks(part.group)
            joints = self._new_joints(index, part.group, found)
            self._joints.append(joints)
            drawn = [self._sample_joint(joint, part.group, found) for joint in joints]
            self.unconstrained.append(joined(drawn))
        return self.values

    def place(self, pick: Callable[[VectorDistribution], Tensor]) -> dict[str, Tensor]:
        """Values without sampling: u of each group is what ``pick`` takes from its q."""
        for index, part in enumerate(self.network.parts):
            u = pick(self.network.distribution(index, *self._parameters(index), None))
            self.unconstrained.append(u)
            found = self._masks(part.group)
            for name in part.group.sites:
                self._refresh({name})
                own = u[..., slice(*part.group.bounds[name])]
                self.values[name] = piece(self.structure.latents[name], found).constrain(own)
        return self.values

    def _new_joints(self, index: int, group: Group, found: Masks) -> list[Joint]:
        """One joint draw for the group, or one per site where the family factorizes."""
        parameters = self._parameters(index)
        scored = found.scored
        if self.network.family(index).factorized:
            return [
                Joint(
                    self.network.site_distribution(index, name, *parameters, scored),
                    {name: (0, stop - start)},
                    partial(self._revised, index, name, scored),
                )
                for name, (start, stop) in group.bounds.items()
            ]
        self._check_scales(group)
        q = self.network.distribution(index, *parameters, scored)
        return [Joint(q, group.bounds, partial(self._revised, index, None, scored))]

    def _revised(self, index: int, name: str | None, scored: Tensor | None) -> VectorDistribution | None:
        """Q of a group, or of one of its sites, at upstream values that changed since it was drawn."""
        upstream = self.network.parts[index].upstream
        if not any(joint.changed for i in upstream for joint in self._joints[i]):
            return None
        for i in upstream:
            self.unconstrained[i] = joined([joint.unconstrained() for joint in self._joints[i]])
        parameters = self._parameters(index)
        if name is None:
            return self.network.distribution(index, *parameters, scored)
        return self.network.site_distribution(index, name, *parameters, scored)

    def _sample_joint(self, joint: Joint, group: Group, found: Masks) -> Tensor:
        for name in joint.bounds:
            self._refresh({name})
            latent = self.structure.latents[name]
            site = joint.site(name, piece(latent, found))
            with ExitStack() as stack:
                for plate in group.plates:
                    stack.enter_context(self.plates[plate])
                if found.shared is not None:
                    stack.enter_context(poutine.mask(mask=cast("torch.BoolTensor", found.shared)))
                if not is_one(latent.scale):
                    stack.enter_context(poutine.scale(scale=latent.scale))
                value = pyro.sample(name, site)
            joint.take(name, value)
            self.values[name] = value
        return joint.settle()

    def _parameters(self, index: int) -> tuple[Tensor, Tensor | None]:
        part = self.network.parts[index]
        context = None
        if part.source is not None and part.encoder is not None:
            key = (part.encoder, id(part.source))
            if key not in self._contexts:
                self._contexts[key] = encode(
                    self.network.encoders[part.encoder],
                    part.source,
                    self.structure,
                    self.args,
                    self.kwargs,
                    self.indices,
                    simulated=self.simulated,
                )
            context = self._contexts[key]
        upstream = None
        if part.upstream:
            upstream = joined([self.unconstrained[i] for i in part.upstream])
        return self.network.parameters_of(index, context, upstream, self.indices)

    def _masks(self, group: Group) -> Masks:
        self._refresh(set(group.sites))
        return masks([self.structure.latents[name] for name in group.sites])

    def _refresh(self, names: set[str]) -> None:
        """Read the model again, at the values so far, if they decide about one of these sites."""
        if names & self.live and self.values:
            latents = {**self.structure.latents, **self.reread(self.values).latents}
            self.structure = self.structure.with_latents(latents)

    def _check_scales(self, group: Group) -> None:
        latents = [self.structure.latents[name] for name in group.sites]
        first = latents[0].scale
        for latent in latents[1:]:
            if latent.scale is not first and not _same(latent.scale, first):
                raise ValueError(
                    f"{group} are drawn jointly, but the model scales '{latents[0].name}' by {first} "
                    f"and '{latent.name}' by {latent.scale}; give them families of their own with "
                    f"family={{'{latent.name}': ...}}, or take DiagonalNormal()"
                )


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    return bool(torch.as_tensor(a == b).all())
