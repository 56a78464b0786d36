"""Masks, scales and enumeration in the model hold for the guide: what does not count there, does not here.

At the same draws as the hand-written densities, to 1e-7. Seed 0 everywhere.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import Recorder, check_loss, hand_written_loss
from models import (
    MASKS,
    PARTICLES,
    ROW_MASK,
    WHOLE,
    ZOO,
    by_every_family,
    by_family,
    by_particles,
    by_sum,
    masked,
    normal_rows,
    prepared,
    rows,
    two,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_guides import DiagonalNormal, FullRankNormal
from pyro_guides.groups import Masks

# name -> model, arguments, depth, scale, masks
MODELS = {name: (*case, None) for name, case in ZOO.items()}
MODELS |= {f"mask {kind}": (masked(kind)[0], (rows(),), 1, 1.0, masked(kind)[1]) for kind in MASKS}


@pytest.mark.crossed
@by_particles
@by_sum
@by_every_family
@pytest.mark.parametrize("kind", MASKS)
def test_what_is_masked_out_does_not_count(kind, family, elbo, particles):
    model, masks = masked(kind)
    check_loss(
        model, prepared(model, rows(), family=family), rows(), elbo=elbo, particles=particles, masks=masks
    )


@by_family
@pytest.mark.parametrize("kind", MASKS)
def test_what_is_masked_out_gets_no_gradient(kind, family):
    model, masks = masked(kind)
    guide = prepared(model, rows(), family=family, amortize=())
    Trace_ELBO(num_particles=5, vectorize_particles=True).loss_and_grads(model, guide, rows())
    gradient = guide.network.heads[0].bias.grad
    scored = [masks.get(name, WHOLE | True).expand(4, size) for name, size in (("z", 2), ("s", 1))]
    scored = torch.cat(scored, dim=-1)
    for part in gradient[:, :3], gradient[:, 3:6]:  # locations and scales
        assert torch.equal(part != 0.0, scored)


def scaled(x, scales):
    with pyro.plate("data", len(x)):
        for name, scale in scales.items():
            with poutine.scale(scale=scale):
                pyro.sample(name, dist.Gamma(two(2.0)[0], 1.0))


@by_particles
@by_sum
@pytest.mark.parametrize(
    ("scales", "family"),
    [
        ({"a": 0.3, "b": 0.3}, FullRankNormal()),
        ({"a": 0.3, "b": 2.0}, DiagonalNormal()),
        ({"a": 0.3, "b": 2.0}, {"a": FullRankNormal(), "b": FullRankNormal()}),
        ({"a": two(0.3, 1.0, 2.0, 0.5), "b": 2.0}, DiagonalNormal()),
    ],
    ids=["joint", "factorized", "groups", "by row"],
)
def test_a_scale_on_a_site_holds_for_the_guide(scales, family, elbo, particles):
    guide = prepared(scaled, rows(), scales, family=family)
    check_loss(scaled, guide, rows(), scales, elbo=elbo, particles=particles, scale=scales)


@by_sum
def test_a_scale_on_the_whole_model_holds_for_the_guide(elbo):
    model = poutine.scale(normal_rows, scale=0.3)
    check_loss(model, prepared(model, rows()), rows(), elbo=elbo, scale=0.3)


def test_sites_drawn_jointly_cannot_be_scaled_apart():
    guide = prepared(scaled, rows(), {"a": 0.3, "b": 2.0}, family=FullRankNormal())
    with pytest.raises(ValueError, match=r"'a' by 0\.3 and 'b' by 2\.0"):
        guide(rows(), {"a": 0.3, "b": 2.0})


def partly_seen(x, seen):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x, obs_mask=seen)


@by_particles
@by_every_family
def test_unseen_values_of_an_observed_site_are_latents(family, particles):
    args = rows(), ROW_MASK
    guide = prepared(partly_seen, *args, family=family)
    masks = {"x_unobserved": ~WHOLE}
    check_loss(partly_seen, guide, *args, particles=particles, masks=masks)


@pytest.mark.crossed
@by_family
@pytest.mark.parametrize("name", MODELS)
def test_exact_divergences_do_not_change_the_mean(name, family):
    model, args, depth, scale, masks = MODELS[name]
    recorder = Recorder(prepared(model, *args, family=family))
    elbo = TraceMeanField_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=depth)
    excess = []
    for _ in range(15):
        recorder.calls.clear()
        loss = elbo.loss(model, recorder, *args)
        excess.append(loss - hand_written_loss(model, recorder, *args, scale=scale, masks=masks))
    excess = torch.tensor(excess)
    assert abs(excess.mean()) < 4.0 * excess.std() / 15**0.5 + 1e-8


def lone(x):
    """A site that is enumerated below a latent of its own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + k.unsqueeze(-1), 0.5).to_event(1), obs=x)


def mixture(x):
    """A latent whose prior depends on an enumerated site."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(k.unsqueeze(-1) * two(1.0, 2.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def summed_out(model):
    """`model` with its enumerated site summed out by hand."""

    def log_p(x, z, k):
        prior, mean = (0.0 * z, z + k) if model is lone else (k * two(1.0, 2.0), z)
        return (dist.Normal(prior, 1.0).log_prob(z) + dist.Normal(mean, 0.5).log_prob(x)).sum(-1)

    def by_hand(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1).mask(False))
            both = torch.logaddexp(log_p(x, z, 0.0) + math.log(0.7), log_p(x, z, 1.0) + math.log(0.3))
            pyro.factor("z and x", both)

    return by_hand


@by_particles
@by_family
@pytest.mark.parametrize("model", [lone, mixture])
def test_enumerated_sites_are_summed_out(model, family, particles):
    recorder = Recorder(prepared(model, rows(), family=family))
    bound = TraceEnum_ELBO(max_plate_nesting=1, **PARTICLES[particles])
    loss = bound.loss(model, recorder, rows())
    assert loss == pytest.approx(hand_written_loss(summed_out(model), recorder, rows()), rel=1e-8)


@pytest.mark.parametrize("kind", MASKS)
def test_control_a_mask_that_is_ignored_is_seen(kind, monkeypatch):
    monkeypatch.setattr("pyro_guides.calls.masks", lambda latents: Masks(None, None, {}))
    model, masks = masked(kind)
    guide = prepared(model, rows())
    with pytest.raises(AssertionError, match="instead of"):
        check_loss(model, guide, rows(), masks=masks)
