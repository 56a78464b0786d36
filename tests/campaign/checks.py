"""What must hold for the guide of any model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from by_hand import Recorder, groups
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    Posterior,
    optim,
    to_arviz,
)

from .densities import hand_written_loss, log_evidence, log_p_by_hand
from .description import Description
from .program import Program, make_data

__all__ = ["check"]

FAMILIES = {
    "diagonal": DiagonalNormal(),
    "full rank": FullRankNormal(),
    "low rank": LowRankNormal(1),
    "mixture": NormalMixture(2),
    "flow": NormalizingFlow(1, hidden=(8,), context_size=4),
}
DRAWS, MANY = 3, 100


def check(description: Description, folder: Path) -> None:
    """Take a model through all that a user does with it."""
    data = make_data(description)
    program = Program(description)
    pyro.clear_param_store()
    pyro.set_rng_seed(description.seed)
    guide = AmortizedGuide(program, family=FAMILIES[description.family], **options(program))
    attaches(guide, program, data)
    trains(guide, program, data)
    has_the_right_elbo(guide, program, data)
    posterior = guide.posterior(*data, num_draws=DRAWS)
    has_consistent_draws(posterior, description, data)
    keeps_rows_apart(guide, posterior, description, data)
    predicts(posterior, description, data)
    is_saved(guide, program, data, posterior, folder / "guide.safetensors")
    is_exported(posterior, description)
    if description.linear:
        has_the_right_mean(guide, program, data)


def options(program: Program) -> dict[str, Any]:
    """How the guide is told what to read, where that is not plain."""
    description = program.description
    if not description.amortized:
        return {"amortize": ()}
    used = {name for site in description.drawn for name in site.plates}
    if not used:
        return {}
    if description.ragged:
        readers = {"group": program.inputs, "row": program.of_rows}
        return {"inputs": {name: readers[name] for name in used}}
    if used == {"right"}:  # columns are not taken for the rows of the data unless this is said
        return {"inputs": {"right": program.of_rows}}
    [first, *others] = description.seen
    return {"inputs": program.of_rows} if others or first.kind == "categorical" else {}


def attaches(guide: AmortizedGuide, program: Program, data: tuple[Tensor, ...]) -> None:
    """The guide draws all latents, in the shapes and supports that the model has for them."""
    guide.setup(*data)
    with torch.no_grad():
        for parameter in guide.network.parameters():  # so that q differs from row to row
            parameter += 0.1 * torch.randn_like(parameter)
    with poutine.trace() as drawn, torch.no_grad():
        guide(*data)
    with poutine.trace() as scored, torch.no_grad():
        poutine.replay(program, trace=drawn.trace)(*data)
    for name in latents(scored.trace):
        fn, value = scored.trace.nodes[name]["fn"], drawn.trace.nodes[name]["value"]
        assert value.shape == fn.batch_shape + fn.event_shape, (name, value.shape, fn.shape())
        assert bool(fn.support.check(value).all()), f"{name} lies outside its support"


def latents(trace: Any) -> list[str]:
    """The latents of a model's trace, all of which a guide's trace must have."""
    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and type(node["fn"]).__name__ != "_Subsample"
    ]


def trains(guide: AmortizedGuide, program: Program, data: tuple[Tensor, ...]) -> None:
    """Steps under both ELBOs move every group's head, and leave all parameters finite."""
    for elbo in (Trace_ELBO, TraceGraph_ELBO):
        svi = SVI(program, guide, optim.Adam({"lr": 1e-3}), elbo())
        named = zip(guide.network.heads, groups(guide), strict=True)
        heads = {names: list(head.parameters()) for head, (names, _) in named}
        before = {names: [p.detach().clone() for p in head] for names, head in heads.items()}
        for _ in range(5):  # scores of equal draws in equal rows cancel, so that one step may not do
            assert math.isfinite(svi.step(*data))
            assert all(bool(p.isfinite().all()) for p in guide.parameters())
            still = [names for names in heads if all(map(torch.equal, before[names], heads[names]))]
            if not still:
                break
        assert not still, f"{elbo.__name__} does not reach {still}"


def has_the_right_elbo(guide: AmortizedGuide, program: Program, data: tuple[Tensor, ...]) -> None:
    """The estimate is log p - log q of its own draws, both computed by hand."""
    description = program.description
    if hides_a_subsample(description):
        return
    for elbo, options in ((Trace_ELBO, {"vectorize_particles": True}), (TraceGraph_ELBO, {})):
        recorder = Recorder(guide)
        bound = elbo(num_particles=2, max_plate_nesting=description.depth, **options)
        loss = bound.loss(program, recorder, *data)
        expected = hand_written_loss(program, recorder, *data)
        assert abs(loss - expected) < 1e-6 * max(1.0, abs(expected)), (elbo, loss, expected)


def hides_a_subsample(description: Description) -> bool:
    """Whether the model draws a subsample that the guide does not know of."""
    used = {name for site in description.drawn for name in site.plates}
    return any(plate.take == "own" and plate.name not in used for plate in description.plates)


def has_consistent_draws(posterior: Posterior, description: Description, data: tuple[Tensor, ...]) -> None:
    """Log q is that of the draws, log p that of the model, and weights do not change when scored again."""
    again = posterior.log_prob(posterior.draws)
    assert torch.allclose(again, posterior.log_q, rtol=1e-7, atol=1e-7)
    rows = posterior.row_plates
    if not (rows and any(plate.take == "chosen" for plate in description.plates)):
        total = posterior.log_p.reshape(DRAWS, -1).sum(-1)
        expected = log_p_by_hand(description, posterior.draws, data, rows)
        assert torch.allclose(total, expected, rtol=1e-7, atol=1e-7), (total, expected)
    fresh = Posterior(posterior.query, num_draws=DRAWS, sample=posterior._sample)
    assert torch.allclose(fresh.log_p - fresh.log_q, posterior.log_weights)


def keeps_rows_apart(
    guide: AmortizedGuide, posterior: Posterior, description: Description, data: tuple[Tensor, ...]
) -> None:
    """Log q of a row does not depend on which other rows there are."""
    masked = any(site.mask for site in description.seen) or any(site.masked for site in description.latents)
    only_rows = len(description.plates) == 1 and all(site.plates for site in description.latents)
    if not (only_rows and description.takes_all and description.amortized) or masked:
        return
    some = torch.tensor([2, 0])
    part = {name: value[:, some] for name, value in posterior.draws.items()}
    found = guide.log_prob(part, *(value[some] for value in data))
    assert torch.allclose(found, posterior.log_q[:, some], rtol=1e-8, atol=1e-8)


def predicts(posterior: Posterior, description: Description, data: tuple[Tensor, ...]) -> None:
    """Predictions have the shapes of the data."""
    predicted = posterior.predict()
    for seen, value in zip(description.seen, data, strict=True):
        if description.takes_all or all(plate.take == "batch" for plate in description.plates):
            assert predicted[seen.name].shape == (DRAWS, *value.shape), seen.name


def has_the_right_mean(guide: AmortizedGuide, program: Program, data: tuple[Tensor, ...]) -> None:
    """Both ELBOs and the posterior's weights agree, within 5 standard errors, and obey the evidence."""
    description = program.description
    if any(plate.take == "own" for plate in description.plates):
        return  # particles would share one subsample
    posterior = guide.posterior(*data, num_draws=MANY)
    if not all(set(posterior.row_plates) <= set(seen.plates) for seen in description.seen):
        return  # what lies outside of the rows does not count in theirs
    weights = posterior.log_weights.reshape(MANY, -1).sum(-1) * description.common_scale
    for name in posterior.row_plates:
        weights = weights * description.plate(name).scale
    error = float(weights.std()) / MANY**0.5 + 1e-6
    for elbo in (Trace_ELBO, TraceGraph_ELBO):
        bound = elbo(MANY, description.depth, vectorize_particles=True)
        found = -bound.loss(program, guide, *data)
        assert abs(found - float(weights.mean())) < 5.0 * 2**0.5 * error, (elbo, found, weights.mean())
    if description.takes_all and description.common_scale == 1.0:
        evidence = log_evidence(description, posterior.draws, data)
        assert float(weights.mean()) < evidence + 5.0 * error, (weights.mean(), evidence)


def is_saved(
    guide: AmortizedGuide, program: Program, data: tuple[Tensor, ...], posterior: Posterior, path: Path
) -> None:
    """A loaded guide gives the same values the same density, to the last bit."""
    guide.save(path)
    loaded = AmortizedGuide.load(path, program, inputs=options(program).get("inputs"))
    draws = posterior.draws
    assert torch.equal(loaded.log_prob(draws, *data), guide.log_prob(draws, *data))


def is_exported(posterior: Posterior, description: Description) -> None:
    """ArviZ gets the draws under the names of their plates."""
    exported = to_arviz(posterior)["posterior"]
    for latent in description.latents:
        dims, values = exported[latent.name].dims, exported[latent.name].values
        assert dims[: 2 + len(latent.plates)] == ("chain", "draw", *latent.plates), dims
        draws = posterior.draws[latent.name].numpy()
        assert values.size == draws.size
        assert np.array_equal(values.reshape(-1), draws.reshape(-1))
