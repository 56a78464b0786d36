"""Encoders: what standardization does to data, what MLPs represent, and any module in their place."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, Standardize, optim
from pyro_guides.layers import ScaledLinear

NAN = float("nan")


# --- Standardize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("shape", [(50, 3), (5, 10, 3)], ids=str)
def test_standardize_uses_mean_and_spread(dtype, shape):
    x = torch.randn(shape, dtype=dtype) * torch.tensor([0.1, 1.0, 300.0], dtype=dtype) + 5.0
    layer = Standardize()
    rows = x.reshape(-1, 3).numpy()
    expected = (x.numpy() - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-3, atol=1e-3)
    assert layer.mean.dtype == layer.inverse_scale.dtype == dtype
    assert not np.allclose(layer(x).numpy(), (x.numpy() - rows.mean(0)) / rows.std(0, ddof=5), rtol=1e-3)


def test_standardize_is_frozen_until_fit():
    layer = Standardize()
    first, second = torch.randn(9, 2), torch.randn(9, 2) + 100.0
    layer(first)
    before = layer(first)
    layer(second)
    assert torch.equal(layer(first), before)
    assert torch.equal(layer.fit(second)(second), Standardize()(second))
    assert not torch.equal(layer(first), before)


COLUMNS = {  # one feature each -> its largest output
    "constant": ([7.3] * 50, 0.0),
    "zero": ([0.0] * 50, 0.0),
    "constant up to rounding": ([0.1 + 0.2, 0.3] * 25, 1e-6),
    "rare": ([0.0] * 999 + [1.0], 10.0),
    "rare and large": ([0.0] * 9999 + [1e6], 10.0),
    "binary": ([0.0, 1.0] * 25, 1.0),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_standardize_keeps_odd_features_small(name):
    values, largest = COLUMNS[name]
    x = torch.tensor(values).unsqueeze(1)
    layer = Standardize()
    torch.testing.assert_close(layer(x).abs().max().item(), largest, rtol=1e-3, atol=1e-6)
    assert layer(x + 1e30).isfinite().all()
    assert layer(x + 1e30).max() < 100.0


def test_standardize_large_mean():
    x = 1.6e9 + 1000.0 * torch.randn(200, 1, dtype=torch.float64)  # time stamps
    torch.testing.assert_close(Standardize()(x).std(correction=0).item(), 1.0)


def test_standardize_single_row_and_outliers():
    layer = Standardize()
    row = torch.tensor([[3.0, -2.0]])
    assert torch.equal(layer(row), row)  # one row says nothing about centre and spread
    x = torch.linspace(-1e4, 1e4, 2001)[:, None].expand(-1, 2)
    y = layer(x)
    assert (y.diff(dim=0) > 0).all()  # an increasing function
    inside = x.abs() <= 10
    assert torch.equal(y[inside], x[inside])
    torch.testing.assert_close(y[-1], torch.full((2,), 10 + math.log1p(1e4 - 10)))
    torch.testing.assert_close(y, -y.flip(0))


def test_standardize_missing_values():
    x = torch.randn(40, 3, dtype=torch.float64)
    x[::3, 0], x[:, 2] = NAN, NAN
    layer = Standardize(missing=True)
    values, there = layer(x).split(3, -1)
    assert torch.equal(there, (~x.isnan()).double())
    assert (values[x.isnan()] == 0).all()
    present = x[~x[:, 0].isnan(), 0].numpy()
    np.testing.assert_allclose(values[there[:, 0] > 0, 0].numpy(), (present - present.mean()) / present.std())
    complete = Standardize()(x[:, 1:2])
    torch.testing.assert_close(values[:, 1:2], complete)
    assert Standardize()(x).isnan().any()  # control: without missing= it stays


def test_standardize_state_loads_where_none_was_taken():
    source, x = Standardize(), torch.randn(9, 2)
    source(x)
    target = Standardize()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x[:3]), source(x[:3]))
    wrong = Standardize()
    wrong(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wrong.load_state_dict(source.state_dict())


# --- layers


@pytest.mark.parametrize("inputs", [1, 16, 400])
@pytest.mark.parametrize("rows", [1, 2000])
def test_scaled_linear_is_a_linear_layer(inputs, rows):
    """Same functions, same distribution at the start; only the step of an optimizer differs."""
    plain, scaled = nn.Linear(inputs, 300), ScaledLinear(inputs, 300)
    assert scaled.gain == min(1.0, 4.0 / math.sqrt(inputs))
    effective = scaled.weight * scaled.gain
    assert effective.abs().max() <= 1 / math.sqrt(inputs) + 1e-6
    torch.testing.assert_close(effective.std(), plain.weight.std(), rtol=0.1, atol=0.0)
    with torch.no_grad():
        scaled.weight.copy_(plain.weight / scaled.gain)
        scaled.bias.copy_(plain.bias)
    x = torch.randn(rows, inputs)
    torch.testing.assert_close(scaled(x), plain(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        scaled.weight.add_(0.01)
    moved = (scaled(x) - plain(x)).abs().max() / (0.01 * x.sum(-1).abs().max())
    torch.testing.assert_close(moved.item(), scaled.gain, rtol=1e-3, atol=0.0)


def test_scaled_linear_zero_and_repr():
    layer = ScaledLinear(3, 2, zero=True, dtype=torch.float64)
    assert torch.equal(layer(torch.randn(4, 3, dtype=torch.float64)), torch.zeros(4, 2, dtype=torch.float64))
    assert repr(ScaledLinear(64, 2)) == "ScaledLinear(64, 2, gain=0.5)"


# --- MLP


def test_mlp_of_depth_zero_represents_any_linear_map():
    x = torch.randn(100, 3, dtype=torch.float64) * torch.tensor([1.0, 20.0, 0.1]) + 4.0
    matrix, offset = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    encoder = MLP(width=5, depth=0)
    encoder(x)
    standardize, linear = encoder.standardize, encoder.linear
    with torch.no_grad():
        linear.weight.copy_(matrix / standardize.inverse_scale / linear.gain)
        linear.bias.copy_(offset + matrix @ standardize.mean)
    torch.testing.assert_close(encoder(x), x @ matrix.T + offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mlp_is_built_by_its_data_and_starts_linear(dtype, depth):
    encoder, x = MLP(width=6, depth=depth), torch.randn(30, 2, 4, dtype=dtype)
    assert list(encoder.parameters()) == []
    context = encoder(x)
    assert (context.shape, context.dtype) == ((30, 6), dtype)
    assert {p.dtype for p in encoder.parameters()} == {dtype}
    assert len(encoder.blocks) == depth
    flat = encoder.standardize(x.flatten(1))
    assert torch.equal(context, encoder.linear(flat))  # blocks start as the identity
    torch.testing.assert_close(encoder(x[3:4]), context[3:4])  # rows do not see each other
    if depth:
        with torch.no_grad():
            for block in encoder.blocks:
                block.outer.weight.normal_()
        assert not torch.allclose(encoder(x), encoder.linear(flat))
        torch.testing.assert_close(encoder(x[3:4]), encoder(x)[3:4])


def test_mlp_missing_values():
    encoder = MLP(width=6, missing=True)
    x = torch.randn(30, 3)
    x[0] = NAN
    context = encoder(x)
    assert encoder.linear.weight.shape == (6, 6)
    assert context.isfinite().all()
    torch.testing.assert_close(context[0], encoder.linear.bias + 0 * context[0])  # zeros, and no indicator
    filled = torch.cat([encoder.standardize.mean[None], x[1:]])
    assert not torch.allclose(encoder(filled)[0], context[0])  # a value at the mean is not a missing one


@pytest.mark.parametrize("options", [{"width": 0}, {"depth": -1}])
def test_mlp_bad_sizes(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"MLP: {name} must .*, got {options[name]}"):
        MLP(**options)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_mlp_state_loads_into_unbuilt_and_built(missing, built, nested):
    def make():
        encoder = MLP(width=6, depth=1, missing=missing)
        return nn.Sequential(encoder, nn.Linear(6, 2)) if nested else encoder

    x, source, target = torch.randn(20, 3), make(), make()
    expected = source(x)
    if built:
        assert not torch.allclose(target(torch.randn(8, 3)), expected[:8])
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), expected)
    assert torch.equal(copy.deepcopy(source)(x), expected)


# --- any module in a guide


def images(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Gamma(2.0, 1.0))
        loc = z.sum(-1) * w
        pyro.sample("x", dist.Normal(loc[..., None, None, None], 1.0).to_event(3), obs=x)


def conv_net():
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(36, 10)]
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """Not a Sequential, with a lazy layer, a buffer and a size of its own."""

    def __init__(self):
        super().__init__()
        self.project = nn.LazyLinear(7)
        self.register_buffer("weights", torch.softmax(torch.arange(8.0), 0))

    def forward(self, x):
        return self.project((x.squeeze(1) * self.weights[:, None]).sum(1))


ENCODERS = {
    "default": lambda: None,
    "mlp": lambda: MLP(width=9, depth=1),
    "conv": conv_net,
    "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
    "standardized": lambda: nn.Sequential(nn.Flatten(), Standardize(), nn.LazyLinear(5), nn.Tanh()),
    "attention": Attention,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_any_module_is_an_encoder(name):
    encoder, x = ENCODERS[name](), torch.randn(12, 1, 8, 8)
    guide = AmortizedGuide(images, encoder)
    svi = SVI(images, guide, optim.Adam({"lr": 0.01}), Trace_ELBO())
    guide.setup(x)
    (used,) = guide.network.encoders
    assert used is encoder or name == "default"
    before = {n: p.detach().clone() for n, p in used.named_parameters()}
    svi.step(x)
    svi.step(x)  # heads start at zero, so the encoder moves from the second step on
    svi.step(x)
    still = [n for n, p in used.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    draws = guide(x[:5])
    assert (draws["z"].shape, draws["w"].shape) == ((5, 2), (5,))
    torch.testing.assert_close(guide.median(x[3:4])["z"], guide.median(x)["z"][3:4])  # rows on their own
    assert not torch.allclose(guide.median(x[3:4])["z"], guide.median(x)["z"][2:3])


class CountCalls(nn.Module):
    """An encoder that counts its calls and the rows it was given."""

    def __init__(self, size=4):
        super().__init__()
        self.linear, self.rows = nn.LazyLinear(size), []

    def forward(self, x):
        self.rows.append(len(x))
        return self.linear(x.flatten(1))


def nested(x):
    """Three groups: rows, cells, and a global one; sites of the rows may be split further."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(z, 1.0))
        with pyro.plate("cell", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(v, scale))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("split", [False, True])
def test_one_encoder_pass_per_call(particles, split):
    encoder, x = CountCalls(), torch.randn(6, 5)
    family = {"v": DiagonalNormal()} if split else None
    guide = AmortizedGuide(nested, encoder, family, amortize=["data"])
    guide.setup(x)
    assert len(guide.network.parts) == 3 + split
    assert encoder.rows == [6]
    del encoder.rows[:]
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=2)
    svi = SVI(nested, guide, optim.Adam({"lr": 0.01}), elbo)
    for _ in range(3):
        svi.step(x)
    guide(x)
    guide.median(x)
    guide.posterior(x, num_draws=50).log_q  # noqa: B018
    assert encoder.rows == [6] * 6


@pytest.mark.parametrize("keys", [("data", "w"), ("z", "w")])
def test_encoders_by_plate_or_site(keys):
    rows, cells = CountCalls(), CountCalls(3)
    inputs = {keys[0]: lambda x: x, keys[1]: lambda x: x.unsqueeze(-1)}
    guide = AmortizedGuide(nested, dict(zip(keys, (rows, cells), strict=True)), inputs=inputs)
    guide(torch.randn(6, 5))
    assert list(guide.network.encoders) == [rows, cells]
    assert (set(rows.rows), set(cells.rows)) == ({6}, {30})
    assert [part.encoder for part in guide.network.parts] == [None, 0, 1]


def test_one_module_for_two_groups_is_shared_and_trained_once():
    shared = CountCalls()
    guide = AmortizedGuide(nested, {"data": shared, "cell": shared}, amortize=["data"])
    guide(torch.randn(6, 5))
    assert list(guide.network.encoders) == [shared]
    assert [part.encoder for part in guide.network.parts] == [None, 0, 0]
    assert len({id(p) for p in guide.parameters()}) == len(list(guide.parameters()))
    assert shared.rows == [6, 6]


def test_default_encoder_is_shared_by_groups_of_one_input():
    guide = AmortizedGuide(nested, amortize=["data"]).setup(torch.randn(6, 5))
    assert [type(e) for e in guide.network.encoders] == [MLP]
    guide = AmortizedGuide(nested).setup(torch.randn(6, 5))  # rows, and single cells
    assert guide.network.training
    assert not AmortizedGuide(nested).eval().setup(torch.randn(6, 5)).network.training
    assert {type(e) for e in guide.network.encoders} == {MLP, DeepSet}


class MeanOfRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.shapes = nn.LazyLinear(8), nn.Linear(8, 4), []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.outer(torch.tanh(self.inner(x)).mean(1))


def test_encoder_of_the_whole_data_set():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    encoder, x = MeanOfRows(), torch.randn(20, 3)
    guide = AmortizedGuide(model, encoder)
    svi = SVI(model, guide, optim.Adam({"lr": 0.02}), Trace_ELBO())
    for n in (20, 7, 20):
        svi.step(x[:n])
    assert guide(x)["mean"].shape == (3,)
    assert encoder.shapes == [(1, 20, 3), (1, 20, 3), (1, 7, 3), (1, 20, 3), (1, 20, 3)]
    order = torch.randperm(20)
    torch.testing.assert_close(guide.median(x)["mean"], guide.median(x[order])["mean"])
    assert not torch.allclose(guide.median(x)["mean"], guide.median(x[:7])["mean"])
    assert AmortizedGuide(model).setup(x).network.parts[0].encoder is None  # only where one is asked for


def test_statistics_come_from_all_rows_of_a_model_that_subsamples():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.randn(50) * 3.0 + 1.0
    guide = AmortizedGuide(model)
    guide(x)
    torch.testing.assert_close(guide.network.encoders[0].standardize.mean, x.mean()[None])
