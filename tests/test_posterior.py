"""Posteriors against exact answers: draws, densities, summaries, unseen rows, export."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import nn

import pyro_guides.posterior.query as query_module
from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, optim

NOISE = 0.6
SHRINK = 1 / (1 + NOISE**2)  # exact: z | x ~ N(SHRINK x, NOISE² SHRINK)
SD = NOISE * math.sqrt(SHRINK)
X = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.2


def rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def growing(x):
    """The same with y = exp(z): a latent on a half line."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(y.log(), NOISE), obs=x)


def of_many(x):
    with pyro.plate("data", 60, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def by_itself(x):
    with pyro.plate("data", len(x), subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])


class Column(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1)


def exact_guide(model, x=X, **options):
    """A guide whose parameters are set to the exact posterior."""
    guide = AmortizedGuide(model, Column(), **options).setup(x)
    output = guide.network.heads[0].output
    with torch.no_grad():
        output.weight.copy_(torch.tensor([[SHRINK], [0.0]]) / output.gain)
        output.bias.copy_(torch.tensor([0.0, math.log(math.expm1(SD - 1e-6))]))
    return guide


def close(actual, expected, tolerance=1e-5):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- exact answers


@pytest.mark.parametrize("model", [rows, growing, of_many], ids=lambda model: model.__name__)
@pytest.mark.parametrize("x", [X, torch.tensor([2.0, -1.0, 0.3])], ids=["seen", "unseen"])
def test_conjugate_answers(model, x):
    posterior = exact_guide(model).posterior(x, num_draws=4000)
    q = stats.norm(SHRINK * x.numpy(), SD)
    natural = np.exp if model is growing else np.asarray
    draws = posterior.draws["z"]
    u = draws.log() if model is growing else draws
    assert draws.shape == (4000, len(x))
    close(posterior.median()["z"], natural(q.mean()))
    levels = [0.025, 0.5, 0.9]
    close(posterior.quantiles(levels)["z"], np.stack([natural(q.ppf(level)) for level in levels]))
    close(posterior.mean()["z"], draws.mean(0))
    close(posterior.sd()["z"], draws.std(0))
    assert abs((u.mean(0).numpy() - q.mean()) / SD).max() * math.sqrt(4000) < 4.5
    assert abs(u.std(0) / SD - 1).max() < 4.5 / math.sqrt(2 * 4000)
    # Per row, free of the subsampling scale; log q from its formula, and log p - log q is the evidence.
    jacobian = u.numpy() if model is growing else 0.0
    close(posterior.log_q, q.logpdf(u.numpy()) - jacobian, 1e-4)
    close(
        posterior.log_p - posterior.log_q,
        stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x.numpy())[None].repeat(4000, 0),
        1e-4,
    )
    close(posterior.log_likelihood["x"], stats.norm(u.numpy(), NOISE).logpdf(x.numpy()), 1e-4)
    assert torch.equal(posterior.observed["x"], x)
    assert posterior.row_plates == ("data",)
    with pytest.raises(AssertionError):  # control
        close(posterior.log_q, stats.norm(SHRINK * x.numpy() + 0.01, SD).logpdf(u.numpy()) - jacobian, 1e-4)


def test_guide_shortcuts_are_those_of_its_posterior():
    guide = exact_guide(rows)
    posterior = guide.posterior(X, num_draws=5)
    assert torch.equal(guide.median(X)["z"], posterior.median()["z"])
    assert torch.equal(
        guide.quantiles([0.1, 0.7], X)["z"], posterior.quantiles(torch.tensor([0.1, 0.7]))["z"]
    )
    assert torch.equal(guide.log_prob(posterior.draws, X), posterior.log_prob(posterior.draws))
    assert repr(posterior) == "Posterior(5 draws of z: (12,))"
    assert posterior.draws["z"] is posterior.draws["z"]  # taken once
    assert not posterior.draws["z"].requires_grad


def test_all_rows_of_a_model_that_subsamples_by_itself():
    guide = exact_guide(by_itself)
    posterior = guide.posterior(X, num_draws=300)
    assert guide(X)["z"].shape == (4,)
    assert posterior.draws["z"].shape == (300, 12)
    close(posterior.median()["z"], SHRINK * X)
    close(posterior.log_q, stats.norm(SHRINK * X.numpy(), SD).logpdf(posterior.draws["z"].numpy()), 1e-4)
    # The model is scored and asked for predictions on blocks of its own size: 4, 4 and 4 of 12.
    evidence = stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(X.numpy())[None].repeat(300, 0)
    close(posterior.log_weights, evidence, 1e-4)
    close(
        posterior.log_likelihood["x"], stats.norm(posterior.draws["z"].numpy(), NOISE).logpdf(X.numpy()), 1e-4
    )
    assert torch.equal(posterior.observed["x"], X)
    assert posterior.predict()["x"].shape == (300, 12)


def test_last_block_of_a_model_that_subsamples_by_itself_may_overlap():
    def by_fives(x):
        with pyro.plate("data", len(x), subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])

    posterior = exact_guide(by_fives).posterior(X, num_draws=50)
    whole = exact_guide(rows).posterior(X, num_draws=50)
    expected = whole.query.model.score(posterior.draws)
    close(posterior.log_p, sum(expected.log_prob.values()), 1e-5)
    prediction = posterior.predict()
    close(prediction["twice"], 2 * posterior.draws["z"])
    noise = (prediction["x"] - posterior.draws["z"]) / NOISE
    assert abs(noise.std() - 1) < 4.5 / math.sqrt(2 * noise.numel())


# --- many shapes


def shared(x, total=12):
    """A global latent and rows: densities are joint, with the subsampling scale."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", total, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def nested(x):
    """Plates at dims -2 and -1, events, constraints, and a site at dim -2 alone."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("group", 3, dim=-2):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        weight = pyro.sample("weight", dist.Dirichlet(torch.ones(4)))
        with pyro.plate("item", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1) + centre + weight[..., 0]
            pyro.sample("x", dist.Normal(loc, scale), obs=x)


def deep_rows(x):
    """Rows at dim -2, with nothing at dim -1."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, None])


NESTED_X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
SHAPES = {  # model, its argument, natural shapes, shape of densities
    "rows": (rows, X, {"z": (12,)}, (12,)),
    "shared": (shared, X, {"mean": (), "z": (12,)}, ()),
    "deep_rows": (deep_rows, X, {"z": (12, 1)}, (12,)),
    "nested": (nested, NESTED_X, {"scale": (), "centre": (3, 1), "weight": (3, 1, 4), "z": (3, 5, 2)}, ()),
}


def trained(name, family=None, steps=30):
    model, x, _, _ = SHAPES[name]
    guide = AmortizedGuide(model, family=family or FullRankNormal())
    svi = SVI(model, guide, optim.Adam({"lr": 0.002}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x)
    return guide, x


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", [FullRankNormal(), DiagonalNormal()], ids=["full", "diagonal"])
@pytest.mark.parametrize("chunk", [None, 40])
def test_shapes_and_densities(name, family, chunk, monkeypatch):
    """Natural shapes, log q as the guide says, log p as one call of the model says, chunked or not."""
    if chunk is not None:
        monkeypatch.setattr(query_module, "_VALUES_PER_PASS", chunk)
    guide, x = trained(name, family)
    model, _, shapes, density = SHAPES[name]
    posterior = guide.posterior(x, num_draws=23)
    assert {n: tuple(d.shape) for n, d in posterior.draws.items()} == {n: (23, *s) for n, s in shapes.items()}
    assert posterior.log_q.shape == posterior.log_p.shape == (23, *density)
    assert len(posterior.draws["z"].flatten().unique()) == posterior.draws["z"].numel()
    for summary in (posterior.mean(), posterior.sd(), posterior.median()):
        assert {n: tuple(d.shape) for n, d in summary.items()} == shapes
    close(guide.log_prob(posterior.draws, x), posterior.log_q, 1e-3)
    for index in (0, 22):
        values = {n: d[index] for n, d in posterior.draws.items()}
        close(guide.log_prob(values, x), posterior.log_q[index], 1e-3)
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
        close(trace.log_prob_sum(), posterior.log_p[index].sum(), 1e-3)
        trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(x)
        close(trace.log_prob_sum(), posterior.log_q[index].sum(), 1e-3)
    shifted = {n: d + 0.1 * (n == "z") for n, d in posterior.draws.items()}
    assert (guide.log_prob(shifted, x) - posterior.log_q).abs().max() > 1e-2  # control


def test_joint_densities_carry_the_subsampling_scale():
    guide, x = trained("shared")
    x = x[:3]
    posterior = guide.posterior(x, num_draws=50)
    mean, z = (posterior.draws[name].numpy() for name in ("mean", "z"))
    terms = stats.norm(mean[:, None], 1.0).logpdf(z) + stats.norm(z, NOISE).logpdf(x.numpy())
    close(posterior.log_p, stats.norm(0, 2.0).logpdf(mean) + 4.0 * terms.sum(1), 1e-4)
    close(posterior.log_likelihood["x"], stats.norm(z, NOISE).logpdf(x.numpy()), 1e-4)  # without it
    assert posterior.row_plates == ()
    assert posterior.log_q.shape == (50,)


def test_rows_are_posteriors_of_their_own():
    guide, _ = trained("rows")
    new = torch.tensor([5.0, -3.0, 0.0])
    together, alone = guide.posterior(new), guide.posterior(new[1:2])
    close(together.median()["z"][1:2], alone.median()["z"])
    values = {"z": torch.tensor([0.1, 0.2, 0.3])}
    close(together.log_prob(values)[1:2], alone.log_prob({"z": values["z"][1:2]}))
    assert not torch.allclose(together.median()["z"][:1], alone.median()["z"])


class Below(dist.Normal):
    """A latent whose bijection is decreasing."""

    support = dist.constraints.less_than(2.0)


SHAPES |= {"below": (lambda x: pyro.sample("z", Below(0.0, 1.0)), X, {"z": ()}, ())}


@pytest.mark.parametrize("name", ["nested", "shared", "below"])
def test_quantiles_from_draws_where_there_is_no_closed_form(name):
    guide, x = trained(name, steps=5)
    posterior = guide.posterior(x, num_draws=400)
    levels = [0.1, 0.5, 0.8]
    for site, values in posterior.quantiles(levels).items():
        close(values, np.quantile(posterior.draws[site].numpy(), levels, axis=0), 1e-4)


def test_a_constant_scale_does_not_hide_rows_that_the_model_leaves_out():
    def model(x):
        with pyro.plate("data", 12, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])

    guide = AmortizedGuide(poutine.scale(model, scale=0.5)).setup(X)
    posterior = guide.posterior(X, num_draws=5)
    z = posterior.draws["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(X)
    torch.testing.assert_close(posterior.log_p, expected)
