"""One call of a guide: from the encoders' contexts to a ``pyro.sample`` per latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_guides.conditional import Conditional
from pyro_guides.distributions import Alphabet, DiscreteSite, Joint, VectorDistribution, VectorMixture
from pyro_guides.distributions.sites import Tags, joined, tags_of
from pyro_guides.enumeration import is_enumerating
from pyro_guides.families import BoundDiscrete
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
        self._tags: list[Tags] = []
        self._contexts: dict[tuple[int, int], Tensor] = {}

    def sample(self) -> dict[str, Tensor]:
        """Run one ``pyro.sample`` per latent, group by group; their values by name."""
        for index, part in enumerate(self.network.parts):
            found = self._masks(part.group)
            if part.group.discrete:
                self._sample_discrete(index, part.group, found)
                continue
            joints = self._new_joints(index, part.group, found)
            self._joints.append(joints)
            drawn = [self._sample_joint(joint, part.group, found) for joint in joints]
            self.unconstrained.append(joined(drawn))
            self._tags.append(frozenset().union(*(joint.tags for joint in joints)))
        return self.values

    def place(self, pick: Callable[[VectorDistribution], Tensor]) -> dict[str, Tensor]:
        """Values without sampling: u of each group is what ``pick`` takes from its q."""
        for index, part in enumerate(self.network.parts):
            u = pick(self._conditional(index).distribution())
            self.unconstrained.append(u)
            found = self._masks(part.group)
            for name in part.group.sites:
                self._refresh({name})
                own = u[..., slice(*part.group.bounds[name])]
                self.values[name] = piece(self.structure.latents[name], found).constrain(own)
        return self.values

    # --- continuous groups

    def _new_joints(self, index: int, group: Group, found: Masks) -> list[Joint]:
        """One joint draw for the group, or one per site where the family factorizes."""
        conditional = self._conditional(index)
        tags = self._upstream_tags(index)
        if self.network.family(index).factorized:
            return [
                Joint(
                    conditional.distribution(found.scored, name),
                    {name: (0, stop - start)},
                    partial(self._revised, index, name, found.scored),
                    tags,
                )
                for name, (start, stop) in group.bounds.items()
            ]
        self._check_scales(group)
        q = conditional.distribution(found.scored)
        if self.network.family(index).stratified and is_enumerating(self.structure.depth):
            q = cast("VectorMixture", q).stratum(self._sample_component(q, group, found))
        return [Joint(q, group.bounds, partial(self._revised, index, None, found.scored), tags)]

    def _sample_component(self, q: VectorDistribution, group: Group, found: Masks) -> Tensor:
        """Enumerate which component of a mixture a draw comes from."""
        component = dist.Categorical(logits=cast("VectorMixture", q).log_weights)
        infer: Any = {"enumerate": "parallel", "is_auxiliary": True}
        name = f"{group.sites[0]}_component"
        while name in self.structure.latents or name in self.structure.observed:
            name += "_"
        with self._inside(group.plates, found.shared, self.structure.latents[group.sites[0]].scale):
            return pyro.sample(name, component, infer=infer)

    def _revised(self, index: int, name: str | None, scored: Tensor | None) -> VectorDistribution | None:
        """Q of a group, or of one of its sites, at upstream values that changed since it was drawn."""
        return self._conditional(index).distribution(scored, name) if self._upstream_changed(index) else None

    def _upstream_changed(self, index: int) -> bool:
        upstream = self.network.parts[index].upstream
        if not any(joint.changed for i in upstream for joint in self._joints[i]):
            return False
        for i in upstream:
            if self._joints[i]:
                self.unconstrained[i] = joined([joint.unconstrained() for joint in self._joints[i]])
        return True

    def _sample_joint(self, joint: Joint, group: Group, found: Masks) -> Tensor:
        for name in joint.bounds:
            self._refresh({name})
            latent = self.structure.latents[name]
            site = joint.site(name, piece(latent, found))
            with self._inside(group.plates, found.shared, latent.scale):
                value = pyro.sample(name, site)
            joint.take(name, value)
            self.values[name] = value
        return joint.settle()

    # --- discrete groups

    def _sample_discrete(self, index: int, group: Group, found: Masks) -> None:
        (name,) = group.sites
        latent = self.structure.latents[name]
        alphabet = cast("Alphabet", latent.alphabet)
        conditional = self._conditional(index)
        mask = found.inner[name][0] if name in found.inner else None

        def revised() -> Any:
            return self._conditional(index).table(alphabet, mask) if self._upstream_changed(index) else None

        site = DiscreteSite(
            conditional.table(alphabet, mask),
            alphabet.dtype,
            control=conditional.controlled,
            tags=self._upstream_tags(index),
            revise=revised,
        )
        infer: Any = {}
        if how := cast("BoundDiscrete", self.network.family(index)).enumerate:
            is_enumerating(self.structure.depth)  # says what is missing
            infer = {"enumerate": how}
        with self._inside(group.plates, found.shared, latent.scale):
            value = pyro.sample(name, site, infer=infer)
        self.values[name] = value
        self.unconstrained.append(latent.unconstrain(detach_provenance(value)))
        self._joints.append([])
        self._tags.append(site.tags | tags_of(value))

    # --- what all groups need

    @contextmanager
    def _inside(
        self, plates: Sequence[str], mask: Tensor | bool | None, scale: float | Tensor
    ) -> Iterator[None]:
        """Enter a group's plates, and its mask and scale where it has some."""
        with ExitStack() as stack:
            for plate in plates:
                stack.enter_context(self.plates[plate])
            if mask is not None:
                stack.enter_context(poutine.mask(mask=cast("torch.BoolTensor", mask)))
            if not is_one(scale):
                stack.enter_context(poutine.scale(scale=scale))
            yield

    def _conditional(self, index: int) -> Conditional:
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
        return self.network.conditional(index, context, upstream, self.indices)

    def _upstream_tags(self, index: int) -> Tags:
        upstream = self.network.parts[index].upstream
        return frozenset().union(*(self._tags[i] for i in upstream))

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
