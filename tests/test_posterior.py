"""Posteriors against exact answers: draws, densities, summaries, unseen rows, export."""

import collections
import math
import sys
import types
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import nn

import pyro_guides.posterior as posterior_module
from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, optim, to_arviz

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
    with pytest.raises(NotImplementedError, match=r"subsamples \['data'\] by itself"):
        posterior.log_p  # noqa: B018


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
        monkeypatch.setattr(posterior_module, "_VALUES_PER_PASS", chunk)
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


# --- ArviZ

GROUPS = ["log_likelihood", "observed_data", "posterior", "sample_stats"]


def same_values(idata, posterior, rename=lambda name: name):
    assert sorted(idata.groups()) == GROUPS
    for group, found in (("posterior", posterior.draws), ("log_likelihood", posterior.log_likelihood)):
        assert sorted(idata[group].data_vars) == sorted(map(rename, found))
        for name, values in found.items():
            stored = idata[group][rename(name)].values
            assert stored.dtype == values.numpy().dtype
            assert np.array_equal(stored.reshape(values.shape), values.numpy())
    for name, values in (("lp", posterior.log_p), ("log_q", posterior.log_q)):
        assert np.array_equal(idata.sample_stats[name].values[0], values.numpy())
    for name, values in posterior.observed.items():
        assert np.array_equal(idata.observed_data[rename(name)].values.reshape(values.shape), values.numpy())


def through_file(idata, folder):
    path = str(folder / "posterior.nc")
    idata.to_netcdf(path)
    with warnings.catch_warnings():  # xarray leaves a filter behind
        return az.from_netcdf(path)


@pytest.mark.parametrize("name", ["rows", "shared", "deep_rows", "nested"])
def test_export_keeps_values_and_names_dimensions(name, tmp_path):
    guide, x = trained(name, steps=3)
    posterior = guide.posterior(x, num_draws=20)
    idata = to_arviz(posterior)
    same_values(idata, posterior)
    plates = {"nested": ["group", "item"]}.get(name, ["data"])
    assert list(idata.posterior["z"].dims)[: 2 + len(plates)] == ["chain", "draw", *plates]
    assert list(idata.observed_data["x"].dims) == plates
    assert list(idata.log_likelihood["x"].dims) == ["chain", "draw", *plates]
    assert list(idata.sample_stats["lp"].dims) == ["chain", "draw", *posterior.row_plates]
    assert idata.posterior.attrs["families"].split(", ") == ["FullRankNormal"] * len(guide.families)
    assert idata.posterior.attrs["inference_library"] == "pyro_guides"
    same_values(through_file(idata, tmp_path), posterior)
    summary = az.summary(idata, kind="stats")
    assert len(summary) == sum(math.prod(shape) for shape in SHAPES[name][2].values())


def test_export_coords_and_dims():
    guide, x = trained("nested", steps=1)
    coords = {"group": ["a", "b", "c"], "part": [10, 20, 30, 40]}
    idata = to_arviz(guide.posterior(x, num_draws=7), coords=coords, dims={"weight": ["part"], "z": ["axis"]})
    assert idata.posterior["weight"].dims == ("chain", "draw", "group", "part")
    assert idata.posterior["z"].dims == ("chain", "draw", "group", "item", "axis")
    assert idata.posterior["weight"].sel(group="b", part=30).shape == (1, 7)
    assert list(idata.posterior["z"].coords["group"].values) == ["a", "b", "c"]


def named(*names, plate="data"):
    def model(x):
        with pyro.plate(plate, len(x)):
            total = sum(pyro.sample(n, dist.Normal(torch.zeros(2), 1.0).to_event(1)) for n in names)
            pyro.sample("x", dist.Normal(total[..., 0], 1.0), obs=x)

    return AmortizedGuide(model).posterior(X, num_draws=6)


def test_export_renames_what_a_file_cannot_hold(tmp_path):
    posterior = named("net/layer.0/bias", "z")
    dims = {"net/layer.0/bias": ["z"]}  # a dimension may not be named like a variable
    idata = to_arviz(posterior, dims=dims)
    same_values(idata, posterior, lambda name: name.replace("/", "."))
    assert idata.posterior["net.layer.0.bias"].dims == ("chain", "draw", "data", "z_dim")
    same_values(through_file(idata, tmp_path), posterior, lambda name: name.replace("/", "."))


@pytest.mark.parametrize(
    ("names", "plate"),
    [
        (["lp", "log_q"], "data"),
        (["z", "chain"], "data"),
        (["draw"], "data"),
        (["z"], "draw"),
        (["z"], "chain"),
    ],
)
def test_export_names_of_arviz_lose_nothing(names, plate):
    """Either everything is there, in its dimensions, or an error names the culprit."""
    posterior = named(*names, plate=plate)
    try:
        idata = to_arviz(posterior)
    except ValueError as error:
        assert any(f"'{name}'" in str(error) for name in ("chain", "draw"))  # noqa: PT017
        return
    assert len(idata.posterior.data_vars) == len(names)
    for name in names:
        (found,) = [v for v in idata.posterior.data_vars if v.startswith(name)]
        assert np.array_equal(idata.posterior[found].values[0], posterior.draws[name].numpy())
        assert len({"chain", "draw"} | set(idata.posterior[found].dims)) == 4
        assert any(plate in dim for dim in idata.posterior[found].dims[2:])


@pytest.mark.parametrize(
    ("names", "options", "culprit"),
    [
        (["a/b", "a.b"], {}, "a.b"),
        (["z"], {"dims": {"z": ["data"]}}, "data"),
        (["z"], {"dims": {"y": ["k"]}}, "y"),
        (["z"], {"dims": {"z": ["k", "l"]}}, "z"),
        (["z"], {"coords": {"dat": list(range(12))}}, "dat"),
        (["z"], {"coords": {"data": [1, 2]}}, "data"),
    ],
)
def test_export_refuses_what_would_lose_data(names, options, culprit):
    with pytest.raises(ValueError, match=culprit):
        to_arviz(named(*names), **options)


def test_export_to_arviz_1(monkeypatch):
    """ArviZ 1.x is known by ``convert_to_datatree`` and takes the groups as one nested dict."""
    calls = []
    module = types.ModuleType("arviz")
    module.convert_to_datatree = None
    tree = collections.defaultdict(lambda: types.SimpleNamespace(attrs={}))
    module.from_dict = lambda *args, **kwargs: calls.append((args, kwargs)) or tree
    monkeypatch.setitem(sys.modules, "arviz", module)
    posterior = named("a/b")
    assert to_arviz(posterior, coords={"data": list(range(12))}) is tree
    ((groups,), options), *rest = calls
    assert rest == []
    assert sorted(groups) == GROUPS
    assert np.array_equal(groups["posterior"]["a.b"], posterior.draws["a/b"].numpy()[None])
    assert groups["observed_data"]["x"].shape == (12,)
    assert options["dims"]["a.b"] == ["data"]
    assert options["coords"] == {"data": list(range(12))}
    assert options["attrs"]["inference_library"] == "pyro_guides"
    del module.convert_to_datatree  # control: without it, ArviZ 0.x's keywords
    to_arviz(posterior)
    assert calls[1][0] == ()
    assert sorted(set(calls[1][1]) - {"coords", "dims"}) == GROUPS
    assert {tree[group].attrs["inference_library"] for group in GROUPS} == {"pyro_guides"}
