"""Can this posterior be trusted, row by row; what holds it back, and what is to be done next?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pyro_guides.diagnostics.evidence import tight_bound
from pyro_guides.diagnostics.familiarity import Familiarity
from pyro_guides.diagnostics.modes import find_modes
from pyro_guides.diagnostics.shared import are_some_rows, rows_share, shared_statistics
from pyro_guides.diagnostics.verdict import verdict
from pyro_guides.posterior import Posterior
from pyro_guides.statistics import arguments, psis

__all__ = ["Check", "check"]


@final
@dataclass(frozen=True, eq=False)
class Check:
    """What is known of how good a posterior is.

    Attributes:
        columns: by name, one value per row, ``(*rows)``:

            * ``k_hat``: Pareto k̂ of the log weights; ``effective_size``: what the draws are worth;
            * ``elbo``: in nats, and ``elbo_error``; ``bound``: an importance-weighted bound on log p(x), and
              ``bound_error``;
            * ``gap``: bound minus ELBO, KL(q‖p) as far as importance sampling sees it;
            * ``amortization_gap``: what the best λ of this row gains, and ``family_gap``: what is left;
            * ``missing``: the share of the posterior in modes that q has lost;
            * ``familiarity``: the p-value that the row is like those of training.
        rows: the plates of the rows, leftmost first.
        num_draws: S, how many draws were judged.
        shared: k̂, effective size and number of draws of the latents that rows share, with the rows'
            own integrated out; empty if they share none.
        held: the shared latents that the rows were judged given.
        trained: whether the guide was trained at all.
        families: the families of the guide, by name.
        settled: whether refinement came to rest; None if there was none.
        notes: what could not be judged, and why.
    """

    columns: dict[str, Tensor]
    rows: tuple[str, ...]
    num_draws: int
    shared: Mapping[str, float]
    held: tuple[str, ...]
    trained: bool
    families: tuple[str, ...]
    settled: bool | None
    notes: tuple[str, ...]

    @property
    def threshold(self) -> float:
        """The k̂ above which importance sampling with so many draws is not to be trusted."""
        return psis.threshold(self.num_draws)

    @property
    def trusted(self) -> Tensor:
        """Which rows can be trusted, with k̂ below the threshold, no mode lost, and like those of training."""
        good = self.columns["k_hat"] < self.threshold
        if "missing" in self.columns:
            good = good & (self.columns["missing"] == 0)
        if "familiarity" in self.columns:
            good = good & (self.columns["familiarity"] >= 0.01)
        return good

    @property
    def table(self) -> Any:
        """One line per row, as a ``pandas.DataFrame`` if pandas is there, else a dict of NumPy arrays."""
        names = self.rows or ("row",)
        shape = self.columns["k_hat"].shape
        grid = torch.meshgrid(*map(torch.arange, shape or (1,)), indexing="ij")
        columns = {name: values.reshape(-1).numpy() for name, values in self.columns.items()}
        index = {name: values.reshape(-1).numpy() for name, values in zip(names, grid, strict=True)}
        try:
            import pandas as pd
        except ImportError:
            return {**index, **columns}
        return pd.DataFrame(columns, index=pd.MultiIndex.from_arrays(list(index.values()), names=names))

    def __repr__(self) -> str:
        return verdict(self)


def check(
    posterior: Posterior,
    *,
    training: Familiarity | None = None,
    gaps: bool = True,
    modes: bool = True,
    show: bool = True,
) -> Check:
    r"""Judge a posterior row by row, and print a verdict: what holds it back, and what to do next.

    The gap between log p(x) and the ELBO is split by refining λ of each row within the family:

    .. math:: \log p(x) - L(\lambda_{\mathrm{amortized}}) =
        \underbrace{\log p(x) - L(\lambda^*)}_{\text{family gap}}
        + \underbrace{L(\lambda^*) - L(\lambda_{\mathrm{amortized}})}_{\text{amortization gap}}

    log p(x) is bounded by importance sampling, from q and from a t distribution fitted to its weighted
    draws. Rows that share latents are judged given a central draw of these.

    Args:
        posterior: what is to be judged; at least 25 draws, better 1,000.
        training: the rows of training, to tell rows that are unlike them.
        gaps: whether to split the gap, which refines λ for some seconds.
        modes: whether to look for modes that q has lost.
        show: whether to print the verdict.

    Raises:
        ValueError: there are too few draws, they are resampled, log densities are NaN, or ``training`` is of
            other encoders.

    Source: Chris Cremer, Xuechen Li, David Duvenaud, "Inference Suboptimality in Variational Autoencoders",
    2018, arXiv:1801.03558; Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman, "Yes, but Did It Work?:
    Evaluating Variational Inference", 2018, arXiv:1802.02538.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide, check
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> posterior = AmortizedGuide(model).posterior(torch.randn(5))
        >>> check(posterior, gaps=False, modes=False, show=False).table.shape
        (5, 7)
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"check takes what guide.posterior(...) returns, got a {type(posterior).__name__}; call "
            "guide.posterior(*args) with the rows to judge"
        )
    if training is not None and not isinstance(training, Familiarity):
        raise TypeError(f"training must be a Familiarity(guide, *args), got a {type(training).__name__}")
    if training is not None and not training.knows(posterior.guide):
        raise ValueError(
            "training is the Familiarity of other encoders: of another guide, or from before the guide was "
            "trained on; make a new one with Familiarity(posterior.guide, *args)"
        )
    for name, value in (("gaps", gaps), ("modes", modes), ("show", show)):
        arguments.flag(name, value)
    if posterior.resampled:
        raise ValueError(
            "these draws are resampled, so that their weights are spent; check where they came from"
        )
    if posterior.num_draws < 25:
        raise ValueError(
            f"a check needs at least 25 draws, better 1,000; this posterior has {posterior.num_draws}"
        )
    notes: list[str] = []
    local, shared = _local(posterior, notes)
    columns = _weights(local)
    settled = _split(local, columns, notes) if gaps else None
    if modes and _searchable(local, notes):
        columns["missing"] = find_modes(local).missing
    if training is not None:
        columns["familiarity"] = training.p_values(*posterior.query.args, **posterior.query.kwargs)
    found = Check(
        columns=columns,
        rows=local.row_plates,
        num_draws=local.num_draws,
        shared=shared,
        held=tuple(local.query.held),
        trained=posterior.guide.is_trained,
        families=tuple(type(family).__name__ for family in posterior.guide.families),
        settled=settled,
        notes=tuple(notes),
    )
    if show:
        print(found)
    return found


def _local(posterior: Posterior, notes: list[str]) -> tuple[Posterior, dict[str, float]]:
    """The rows on their own, and what is known of the latents that they share."""
    if not rows_share(posterior):
        return posterior, {}
    shared: dict[str, float] = {}
    if are_some_rows(posterior):
        notes.append("latents that rows share are judged on all rows only, and these are some of them")
    else:
        shared = shared_statistics(posterior)
    return posterior.local(), shared


def _weights(local: Posterior) -> dict[str, Tensor]:
    """What the log weights of the rows say."""
    bound, error = local.bound()
    return {
        "k_hat": local.k_hat,
        "effective_size": local.effective_size,
        "elbo": local.elbo,
        "elbo_error": local.log_weights.std(0) / local.num_draws**0.5,
        "bound": bound,
        "bound_error": error,
        "gap": bound - local.elbo,
    }


def _split(local: Posterior, columns: dict[str, Tensor], notes: list[str]) -> bool | None:
    """Split the gap into what amortization and what the family costs; whether refinement has settled."""
    best = local if local.query.refinement is not None else local.refine()
    bounds = [best.bound()]
    if _searchable(local, notes):
        bounds.append(tight_bound(best))
    for bound, error in bounds:
        sharper = error < columns["bound_error"]
        columns["bound"] = torch.where(sharper, bound, columns["bound"])
        columns["bound_error"] = torch.where(sharper, error, columns["bound_error"])
    # The gain comes from common random numbers, and is known better than the two ELBOs that it lies between.
    gain, error = torch.zeros_like(best.elbo), torch.zeros_like(best.elbo)
    if best is not local and best.gain is not None:
        gain, error = best.gain.value, best.gain.error
    columns["elbo"] = best.elbo - gain
    columns["elbo_error"] = torch.hypot(best.log_weights.std(0) / best.num_draws**0.5, error)
    columns["gap"] = columns["bound"] - columns["elbo"]
    columns["amortization_gap"] = gain
    columns["family_gap"] = columns["bound"] - best.elbo
    return best.gain.settled if best.gain is not None else None


def _searchable(local: Posterior, notes: list[str]) -> bool:
    """Whether values of the latents can be moved about freely; else a note says why not."""
    latents = local.query.latents.values()
    note = ""
    if any(latent.discrete or not latent.fixed for latent in latents):
        note = (
            "some latents are discrete or masked: log p(x) is bounded by draws of q alone, and modes that q "
        )
        note += "has lost are not looked for"
    elif sum(latent.size for latent in latents) > _MOST_VALUES:
        note = f"a row has more than {_MOST_VALUES} values, too many to look for lost modes"
    if note and note not in notes:
        notes.append(note)
    return not note


_MOST_VALUES = 300  # the search takes twice as many gradients to learn how curved a mode is
