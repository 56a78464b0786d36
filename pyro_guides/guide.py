"""The guide: binds a model's structure, encoders and families into a Pyro guide."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import pyro
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pyro_guides import saving
from pyro_guides.calls import Call
from pyro_guides.families import Family, FullRankNormal
from pyro_guides.inputs import accepts, with_observations
from pyro_guides.module import GuideModule
from pyro_guides.naming import announce
from pyro_guides.planning import Plan, build
from pyro_guides.plates import differ, open_plates, subsample_indices, user_plates
from pyro_guides.promotion import promote
from pyro_guides.structure import Memory, Structure

if TYPE_CHECKING:
    from pyro_guides.posterior import Posterior

__all__ = ["AmortizedGuide"]


@final
class AmortizedGuide(GuideModule):
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
        plan = Plan(
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
        super().__init__(model, plan, create_plates, name)

    # --- life cycle

    @property
    def families(self) -> tuple[Family, ...]:
        """The family of each group, once the guide is set up."""
        return tuple(part.family for part in self.network.parts)

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
        self._take(network if self.training else network.eval(), memory, network.fingerprint())
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

    # --- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide to a file, which :meth:`load` reads: an ordinary safetensors file, without pickle.

        It holds the network and what the guide knows of its model, with a checksum, and replaces an earlier
        file in one step: a crash leaves the old one or the new one. Parameters of the model itself, such as a
        decoder's, are not in it; keep their ``state_dict()``.

        Args:
            path: where to.

        Raises:
            RuntimeError: the guide is not set up.
            OSError: the file cannot be written; an earlier one is unchanged.
            TypeError: the guide holds what no file can hold: a family of your own, or a :class:`ZukoFlow`.
        """
        network, memory = self.network, self._require_memory()
        saving.save(
            path,
            saving.Contents(network, self._plan, memory, self.create_plates, self._start, self.training),
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable[..., Any],
        *,
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        inputs: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
        device: torch.device | str = "cpu",
    ) -> AmortizedGuide:
        """The guide that :meth:`save` wrote: it answers, trains on and is saved again as the one before.

        A file holds no code. What was yours - an encoder of your own class, functions - is given again, in
        the form in which the guide was made; an encoder takes over the state it had. Encoders of this
        package and those built from ``torch.nn`` alone are in the file.

        Args:
            path: the file.
            model: the model that the guide was made for; the first call checks its latents.
            encoder: your own encoders, if there were any.
            inputs: your functions of the model's arguments, if there were any.
            create_plates: your function of that name, if there was one.
            name: as for a new guide.
            device: where its parameters go.

        Raises:
            UnreadableFileError: the file is damaged, holds something else, or is of a newer version; a
                ``ValueError`` of :mod:`pyro_guides.storage`.
            OSError: there is no such file, or it may not be read.
            TypeError: an encoder or a function is missing, or is not needed.
            ValueError: the state of an encoder of your own does not fit it.

        Example:
            >>> import pathlib, pyro, tempfile, torch
            >>> import pyro.distributions as dist
            >>> from pyro_guides import AmortizedGuide
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            >>> x = torch.randn(5)
            >>> guide = AmortizedGuide(model).setup(x)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     guide.save(pathlib.Path(folder, "guide.safetensors"))
            ...     loaded = AmortizedGuide.load(pathlib.Path(folder, "guide.safetensors"), model)
            >>> torch.equal(loaded.median(x)["z"], guide.median(x)["z"])
            True
        """
        found = saving.load(path, encoder, inputs, create_plates, device)
        guide = cls(model, create_plates=found.create_plates, name=name)
        guide._plan, guide.training = found.plan, found.training
        guide._take(found.network, found.memory, found.start)
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
