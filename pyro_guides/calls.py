"""One call of a guide: from the encoders' contexts to a ``pyro.sample`` per latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from pyro_guides.encoding import Contexts, Encoding, encode
from pyro_guides.enumeration import is_enumerating
from pyro_guides.families import BoundDiscrete
from pyro_guides.groups import Group, Masks, masks, piece
from pyro_guides.network import Frame, Network, step_names
from pyro_guides.particles import are_drawn_once, are_weighed
from pyro_guides.plates import subsample_indices
from pyro_guides.refinement import Refinement
from pyro_guides.structure import Structure, is_one, outer_dims
from pyro_guides.turns import Turn, take_turns

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
        live: whether a latent's support, mask or scale depends on other latents.
        reread: reads the model's structure again, given values of latents.
        simulated: whether the arguments hold data that the model has drawn.
        refinement: changes of λ for the rows at hand.
        contexts: what encoders are known to return for these inputs.
    """

    def __init__(
        self,
        network: Network,
        structure: Structure,
        plates: Mapping[str, pyro.plate],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        live: Callable[[str], bool],
        reread: Callable[[Mapping[str, Tensor]], Structure],
        simulated: bool = False,
        refinement: Refinement | None = None,
        contexts: dict[Encoding, Contexts] | None = None,
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
        self.refinement = refinement
        self.values: dict[str, Tensor] = {}
        self.turns = take_turns([part.group for part in network.parts], structure)
        # By turn: u, None where this call does not have the group; the draws behind it; their tags.
        self._u: list[Tensor | None] = []
        self._joints: list[list[Joint]] = []
        self._tags: list[Tags] = []
        self._contexts: dict[Encoding, Contexts] = {} if contexts is None else contexts
        self._frames: dict[int, Frame | None] = {}

    @property
    def unconstrained(self) -> list[Tensor]:
        """What was drawn: u of each group, ``(*batch, D)``."""
        return [u for u in self._u if u is not None]

    def sample(self) -> dict[str, Tensor]:
        """Run one ``pyro.sample`` per latent, group by group; their values by name."""
        for turn in self.turns:
            if not self._is_latent(turn.group):
                self._note(self._observed(turn.group))
                continue
            found = self._masks(turn.group)
            if turn.group.discrete:
                self._sample_discrete(turn, found)
                continue
            joints = self._new_joints(turn, found)
            drawn = [self._sample_joint(joint, turn.group, found) for joint in joints]
            tags = frozenset[str]().union(*(joint.tags for joint in joints))
            self._note(joined(drawn), joints, tags)
        return self.values

    def place(
        self, pick: Callable[[VectorDistribution], Tensor], held: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Values without sampling: u of each group is what ``pick`` takes from its q, or what is held."""
        for turn in self.turns:
            names = turn.group.sites
            if not self._is_latent(turn.group):
                self._note(self._observed(turn.group))
                continue
            if held.keys() >= set(names):
                self._note(joined([self._held(name, held[name]) for name in names]))
                continue
            u = pick(self._conditional(turn).distribution())
            self._note(u)
            found = self._masks(turn.group)
            for name in names:
                self._refresh({name})
                own = u[..., slice(*turn.group.bounds[name])]
                self.values[name] = piece(self.structure.latents[name], found).constrain(own)
        return self.values

    def _held(self, name: str, value: Tensor) -> Tensor:
        """U of a latent that has a given value, on the support that earlier values give it."""
        self._refresh({name})
        self.values[name] = value
        return self.structure.latents[name].unconstrain(value)

    def _note(self, u: Tensor | None, joints: Sequence[Joint] = (), tags: Tags = frozenset()) -> None:
        self._u.append(u)
        self._joints.append(list(joints))
        self._tags.append(tags)

    # --- what this call has of a group

    def _is_latent(self, group: Group) -> bool:
        """Whether the group is to be drawn.

        Raises:
            ValueError: this call samples some of its sites only.
        """
        there = [name in self.structure.latents for name in group.sites]
        if all(there) or not any(there):
            return there[0]
        name = group.sites[there.index(False)]
        raise ValueError(
            f"{group} are drawn jointly, but this call of the model does not sample '{name}': give sites "
            f"that are observed or absent in some calls a group of their own, with family={{'{name}': ...}}"
        )

    def _observed(self, group: Group) -> Tensor | None:
        """U of a group that this call observes; None if the call does not have it at all."""
        found = [self.structure.observed[name] for name in group.sites if name in self.structure.observed]
        if len(found) < len(group.sites):
            return None
        return joined([site.unconstrained(self.args, self.kwargs) for site in found])

    # --- continuous groups

    def _new_joints(self, turn: Turn, found: Masks) -> list[Joint]:
        """One joint draw for the group, or one per site where the family factorizes."""
        group, family = turn.group, self.network.family(turn.part)
        conditional = _masked(self._conditional(turn), found)
        tags = self._upstream_tags(turn)
        if family.factorized:
            return [
                Joint(
                    conditional.distribution(found.scored, name),
                    {name: (0, stop - start)},
                    partial(self._revised, turn, name, found.scored),
                    tags,
                )
                for name, (start, stop) in group.bounds.items()
            ]
        self._check_scales(group)
        q = conditional.distribution(found.scored)
        if family.stratified and is_enumerating(self.structure.depth):
            q = cast("VectorMixture", q).stratum(self._sample_component(q, group, found))
        return [Joint(q, group.bounds, partial(self._revised, turn, None, found.scored), tags)]

    def _sample_component(self, q: VectorDistribution, group: Group, found: Masks) -> Tensor:
        """Enumerate which component of a mixture a draw comes from."""
        component = dist.Categorical(logits=cast("VectorMixture", q).log_weights)
        infer: Any = {"enumerate": "parallel", "is_auxiliary": True}
        name = f"{group.sites[0]}_component"
        while name in self.structure.latents or name in self.structure.observed:
            name += "_"
        with self._inside(group.plates, found.shared, self.structure.latents[group.sites[0]].scale):
            return pyro.sample(name, component, infer=infer)

    def _revised(self, turn: Turn, name: str | None, scored: Tensor | None) -> VectorDistribution | None:
        """Q of a group, or of one of its sites, at upstream values that changed since it was drawn."""
        return self._conditional(turn).distribution(scored, name) if self._upstream_changed(turn) else None

    def _upstream_changed(self, turn: Turn) -> bool:
        upstream = [at for at in self._upstream_turns(turn) if at is not None]
        if not any(joint.changed for at in upstream for joint in self._joints[at]):
            return False
        for at in upstream:
            if self._joints[at]:
                self._u[at] = joined([joint.unconstrained() for joint in self._joints[at]])
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

    def _sample_discrete(self, turn: Turn, found: Masks) -> None:
        group = turn.group
        (name,) = group.sites
        latent = self.structure.latents[name]
        alphabet = cast("Alphabet", latent.alphabet)
        conditional = _masked(self._conditional(turn), found)
        mask = found.inner[name][0] if name in found.inner else None

        def revised() -> Any:
            return self._conditional(turn).table(alphabet, mask) if self._upstream_changed(turn) else None

        site = DiscreteSite(
            conditional.table(alphabet, mask),
            alphabet.dtype,
            control=conditional.controlled,
            tags=self._upstream_tags(turn),
            revise=revised,
        )
        infer: Any = {}
        if how := cast("BoundDiscrete", self.network.family(turn.part)).enumerate:
            is_enumerating(self.structure.depth)  # says what is missing
            infer = {"enumerate": how}
        with self._inside(group.plates, found.shared, latent.scale):
            value = pyro.sample(name, site, infer=infer)
        self.values[name] = value
        self._note(latent.unconstrain(detach_provenance(value)), tags=site.tags | tags_of(value))

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

    def _conditional(self, turn: Turn) -> Conditional:
        contexts = [
            self._encode(encoding).at(turn.step) for encoding in self.network.parts[turn.part].encodings
        ]
        context = joined(contexts) if contexts else None
        before = self._upstream_turns(turn)
        values = [None if at is None else self._u[at] for at in before]
        weighed = are_weighed(turn.group.plates)
        shared = [weighed and at is not None and are_drawn_once(self.turns[at].group.plates) for at in before]
        upstream = self.network.upstream(turn.part, values, self.structure.plates, self._frame, shared)
        change = self.refinement.get(turn.part, turn.step) if self.refinement is not None else None
        conditional = self.network.conditional(turn, context, upstream, self.indices, change)
        # Particles that weigh against each other share their costs: their mean is no control of one's score.
        return replace(conditional, control=None, prediction=None) if weighed else conditional

    def _encode(self, encoding: Encoding) -> Contexts:
        """The contexts of this call, from one pass of the encoder."""
        if encoding not in self._contexts:
            self._contexts[encoding] = encode(
                encoding,
                self.network.encoders[encoding.encoder],
                self.structure,
                self.args,
                self.kwargs,
                self.indices,
                steps=step_names(encoding, self.network.parts, self.turns),
                outer=self.simulated or bool(outer_dims()),
            )
        return self._contexts[encoding]

    def _frame(self, index: int) -> Frame | None:
        """The units of a group; once per call, however many steps of a sequence see it."""
        if index not in self._frames:
            self._frames[index] = self.network.frame(index, self.indices)
        return self._frames[index]

    def _upstream_turns(self, turn: Turn) -> list[int | None]:
        """The turns whose values a group depends on, this step's first; None for what is not there."""
        links = self.network.parts[turn.part].links
        return [turn.before.get(i) for i in links.upstream] + [turn.previous.get(i) for i in links.previous]

    def _upstream_tags(self, turn: Turn) -> Tags:
        return frozenset[str]().union(
            *(self._tags[at] for at in self._upstream_turns(turn) if at is not None)
        )

    def _masks(self, group: Group) -> Masks:
        self._refresh(set(group.sites))
        return masks([self.structure.latents[name] for name in group.sites])

    def _refresh(self, names: set[str]) -> None:
        """Read the model again, at the values so far, if they decide about one of these sites."""
        if self.values and any(map(self.live, names)):
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


def _masked(conditional: Conditional, found: Masks) -> Conditional:
    """The same, whose control variate knows what is masked."""
    if conditional.control is None:
        return conditional
    counted = found.shared if found.scored is None else found.scored.any(-1)
    return conditional if counted is None else replace(conditional, counted=torch.as_tensor(counted))


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    return bool(torch.as_tensor(a == b).all())
