"""The guide: binds a model's structure, encoders and families into a Pyro guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast, final

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, init_to_median
from torch import Tensor, nn

from pyro_guides.calls import Call
from pyro_guides.families import Family, FullRankNormal
from pyro_guides.inputs import accepts, with_observations
from pyro_guides.naming import announce, unique_name
from pyro_guides.network import Network
from pyro_guides.planning import Plan, build
from pyro_guides.plates import differ, open_plates, subsample_indices, user_plates
from pyro_guides.promotion import promote
from pyro_guides.structure import Memory, Structure
from pyro_guides.structure.memory import require

if TYPE_CHECKING:
    from pyro_guides.posterior import Posterior

__all__ = ["AmortizedGuide"]


@final
class AmortizedGuide(AutoGuide):
    r"""A posterior q(z | x) for any Pyro model, with a neural encoder.

    Reads the model, groups its latents by their plates, and gives each group a family q(u; λ) over its
    unconstrained values. Groups inside the plates of the data are *amortized*: an encoder maps each datum
    to its λ, so that the guide serves rows never seen in training. Other groups are *learned*: λ is a
    parameter. Groups are drawn in the model's order, each given those before it that it depends on:

    .. math:: q(z \mid x) = \prod_g q\bigl(u_g; \lambda_g(x, u_{<g})\bigr) |\det \partial u_g / \partial z_g|

    Inputs in more plates than a group are pooled; latents with running numbers, ``z_1 .. z_T``, share one
    family per step. Sites that a call observes are conditioned on; in others they are drawn. See
    ``docs/models.md``.

    Works in place of Pyro's autoguides, under any of its ELBOs. With no data to encode it *is* an ordinary
    autoguide. Parameters exist after the first call or :meth:`setup`.

    Args:
        model: a Pyro model; it stays as it is.
        encoder: a module from rows ``(B, ...)`` to contexts ``(B, C)``, or a dict of them by plate or
            site. If None, an :class:`~pyro_guides.MLP` for rows, a :class:`~pyro_guides.DeepSet` for what
            is pooled, a :class:`~pyro_guides.GRUEncoder` for sequences. If no argument lines up with a
            latent's plates, an encoder given here reads the data set as a whole, as a single row.
        family: what kind of distribution each group gets; one for all, or a dict by plate or site. A site
            named here forms a group of its own.
        inputs: a function of the model's arguments that returns what the encoder reads, or a dict of them
            by plate or site: a tensor; a dict of tensors, of which a boolean one is a mask; or one of these
            and an integer tensor, the plate's element that each row belongs to. If None, it is the float
            argument whose leading dimensions are the plates.
        amortize: names of the plates whose latents get an encoder; all that line up with the inputs if
            None, none if empty.
        condition_on_upstream: whether λ of a group sees the values of earlier groups.
        order: all latents by name in the order of drawing; the model's order if None.
        given: for some latents, by name, those that their λ sees, instead of those that are relevant.
        init_loc_fn: where q starts, one of Pyro's ``init_to_...`` functions.
        init_scale: the standard deviation of unconstrained values at the start.
        create_plates: as in Pyro's autoguides, a function of the model's arguments that returns plates to
            use instead of the model's.
        name: the prefix of the parameters' names; a new one by default, since two guides of one name
            would share their parameters in Pyro's store.

    Raises:
        TypeError, ValueError: an argument is not what it should be.

    Source: Diederik P. Kingma, Max Welling, "Auto-Encoding Variational Bayes", 2014, arXiv:1312.6114.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_guides import AmortizedGuide, optim
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> x = torch.randn(100) * 1.25**0.5
        >>> guide = AmortizedGuide(model)
        >>> svi = SVI(model, guide, optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> losses = [svi.step(x) for _ in range(300)]
        >>> guide.median(torch.tensor([1.0]))["z"].shape
        torch.Size([1])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        family: Family | Mapping[str, Family] | None = None,
        *,
        inputs: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
        amortize: Collection[str] | None = None,
        condition_on_upstream: bool = True,
        order: Sequence[str] | None = None,
        given: Mapping[str, Collection[str]] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        for label, function in (("model", model), ("create_plates", create_plates)):
            if not callable(function) and not (label == "create_plates" and function is None):
                raise TypeError(f"{label} must be a function, got {function!r}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        super().__init__(model, create_plates=create_plates)
        self._plan = Plan(
            encoder=encoder,
            family=FullRankNormal() if family is None else family,
            inputs=inputs,
            amortize=amortize,
            condition_on_upstream=condition_on_upstream,
            order=order,
            given=given,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
        )
        self._store_name = unique_name(name)
        self._memory: Memory | None = None
        self._start = 0.0  # what tells whether parameters have moved

    # --- life cycle

    @property
    def network(self) -> Network:
        """The trainable part of the guide, once it is set up."""
        network = self._modules.get("network")
        if network is None:
            raise RuntimeError(
                "the guide has no parameters yet: call guide.setup(*args) with the model's arguments "
                "(or the guide itself) first"
            )
        return cast("Network", network)

    @property
    def families(self) -> tuple[Family, ...]:
        """The family of each group, once the guide is set up."""
        return tuple(part.family for part in self.network.parts)

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has read its model and built its parameters."""
        return "network" in self._modules

    @property
    def is_trained(self) -> bool:
        """Whether parameters have moved since the guide was set up."""
        return self.network.fingerprint() != self._start

    def setup(self, *args: Any, **kwargs: Any) -> AmortizedGuide:
        """Read the model and build all parameters; the first call of the guide does it too.

        Called with all rows, it also lets the encoder standardize its inputs with all of them.

        Raises:
            RuntimeError: the model has no latents.
            ValueError, TypeError: the model or its arguments do not fit the guide.
        """
        if self.is_set_up:
            return self
        network, structure = build(self._plan, self.model, args, kwargs)
        memory = Memory(self.model, args, kwargs, structure, network.stems, network.masked)
        if self.master is not None:
            self._setup_prototype(*args, **kwargs)  # the list checks that its parts agree
        self._memory = memory
        self._modules["network"] = network if self.training else network.eval()
        self._start = network.fingerprint()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latents; call the guide itself instead.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments; ``observations`` (a dict of observed values, which
                Pyro's wake-sleep algorithms pass) replaces the arguments that are observed.

        Returns:
            The latents' values by name.
        """
        call = self._open(args, kwargs)
        announce(self._store_name, self.network)
        return call.sample()

    def promote(self, family: Family | Mapping[str, Family], *, only_new: bool = False) -> AmortizedGuide:
        """A new guide with the same q and the freedom of a richer family.

        What was learned is kept - encoder, learned groups, λ of every datum - and what is new starts at
        nothing, so that training goes on from where it is. The old guide stays as it is. From
        ``DiagonalNormal`` steps lead to ``LowRankNormal``, ``FullRankNormal``, ``NormalMixture`` and
        ``NormalizingFlow``; see the error of a step that is not there.

        A mixture's components start a little apart, by 0.03 of their standard deviation, since equal ones
        would stay equal; all other steps change q by no more than rounding.

        Args:
            family: the new family, for all continuous groups or by plate or site.
            only_new: whether optimizers are to see only what is new; the rest no longer requires
                gradients, until ``guide.requires_grad_()``.

        Raises:
            RuntimeError: the guide is not set up.
            TypeError: ``family`` is no family.
            ValueError: the new family cannot be what the old one has become.

        Example:
            >>> import pyro, torch
            >>> import pyro.distributions as dist
            >>> from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...         pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)
            >>> guide = AmortizedGuide(model, family=DiagonalNormal()).setup(torch.randn(5))
            >>> guide.promote(FullRankNormal()).families
            (FullRankNormal(stick_the_landing=True),)
        """
        _ = self.network  # says what to do if the guide is not set up
        guide = copy.deepcopy(self)
        promote(guide.network, family, only_new=only_new)
        return guide

    # --- what the posterior is for given data

    def posterior(self, *args: Any, num_draws: int = 1000, **kwargs: Any) -> Posterior:
        """The posterior of the given rows, which training need not have seen.

        Args:
            *args: the model's arguments.
            num_draws: S, how many draws to take.
            **kwargs: the model's keyword arguments.
        """
        from pyro_guides.posterior import Posterior, Query

        return Posterior(Query.of(self.setup(*args, **kwargs), args, kwargs), num_draws=num_draws)

    def posteriors(self, batches: Iterable[Any], *, num_draws: int = 1000) -> Iterator[Posterior]:
        """The posteriors of batch after batch of rows; what rows share has the same draws in every batch.

        Args:
            batches: a ``DataLoader``, or any iterable of what the model takes: one argument, a tuple or
                list of arguments, or a dict of keyword arguments.
            num_draws: S, how many draws to take of each row.
        """
        from pyro_guides.posterior import posteriors

        return posteriors(self, batches, num_draws)

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Exact log q of given values of all latents, per row: see ``Posterior.log_prob``."""
        return self.posterior(*args, **kwargs).log_prob(values)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent for the given data, in natural shapes.

        Groups that depend on upstream values are taken at the upstream medians, which is exact where
        that dependence is linear. Families without closed quantiles take the median of 1,000 draws.
        """
        return self.posterior(*args, **kwargs).median()

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent for the given data: see ``Posterior.quantiles``."""
        return self.posterior(*args, **kwargs).quantiles(quantiles)

    @torch.no_grad()
    def sample_latent(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """One draw of the unconstrained values u of each group, ``(*batch, D)``."""
        with pyro.poutine.block():
            call = self._open(args, kwargs)
            call.sample()
        return call.unconstrained

    # --- one call

    def _open(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        structure: Structure | None = None,
        **options: Any,
    ) -> Call:
        """Settle the structure, unless it is given, and open the plates of one call."""
        kwargs = dict(kwargs)
        observations = None
        if "observations" in kwargs and not accepts(self._known_model, "observations"):
            observations = kwargs.pop("observations")
        self.setup(*args, **kwargs)
        settled = structure is not None
        if structure is None:
            structure = self._structure(args, kwargs, complete=observations is not None)
        if self.master is not None and not settled:
            plates = dict(self.master().plates)  # the list has opened them for all of its parts
        else:
            own = {name for part in self.network.parts for name in part.group.plates}
            users = user_plates(self.create_plates, args, kwargs)
            plates = open_plates(structure, own, users, fresh=not settled and structure.static)
        indices = subsample_indices(plates)
        memory = self._require_memory()

        def reread(given: Mapping[str, Tensor]) -> Structure:
            return memory.read_again(self.model, args, kwargs, given, indices=indices)

        if not settled and not structure.static and differ(structure, indices):
            structure = reread({}).completed_by(structure)
        args, kwargs = with_observations(structure, args, kwargs, observations)
        simulated = observations is not None
        return Call(
            self.network,
            structure,
            plates,
            args,
            kwargs,
            live=memory.is_live,
            reread=reread,
            simulated=simulated,
            **options,
        )

    def _structure(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, complete: bool) -> Structure:
        """The model's structure for these arguments, checked against what the guide was set up for."""
        memory = self._require_memory()
        structure = memory.structure(self._known_model, args, kwargs, complete=complete)
        self.network.check_learned(structure)
        return structure

    # --- copies, files and modules

    @property
    def model(self) -> Callable[..., Any]:
        """The model; a guide that was unpickled needs it set again."""
        return require(self._known_model)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # not a submodule, even if it is a module
            object.__setattr__(self, "_model", (value,))
        else:
            super().__setattr__(name, value)

    @property
    def _known_model(self) -> Callable[..., Any] | None:
        return self._model[0] if self._model else None

    def _require_memory(self) -> Memory:
        _ = self.network  # says what to do if the guide is not set up
        return cast("Memory", self._memory)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; before :meth:`setup` there are none, and asking is a mistake.

        Raises:
            RuntimeError: the guide is not set up, so that an optimizer would miss its parameters.
        """
        _ = self.network
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, once the guide is set up."""
        _ = self.network
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As any module's, once the guide is set up."""
        _ = self.network
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The guide without its model, which may not be picklable, and without its list."""
        for parameter in super().parameters() if self.is_set_up else ():
            # Pyro's store hangs a weak reference on every tensor it hands out, anew at each access.
            vars(parameter).pop("unconstrained", None)
        # Where q started is of no use any more, and may be a function that cannot be pickled.
        plan = replace(self._plan, init_loc_fn=init_to_median) if self.is_set_up else self._plan
        return {**self.__dict__, "_model": None, "master": None, "_plan": plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        object.__setattr__(self, "_store_name", unique_name())

    def __deepcopy__(self, memo: dict[int, Any]) -> AmortizedGuide:
        """A guide of the same model with parameters of its own, under a name of its own."""
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        object.__setattr__(clone, "_model", self._model)
        return clone
