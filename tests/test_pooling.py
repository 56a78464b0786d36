"""Inputs in more plates than a group, in fewer, or in none: sets, ragged groups, whole data sets."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from torch import nn

from pyro_guides import MLP, AmortizedGuide, DeepSet, SetEncoder, SetTransformer, optim


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nested(y, areas=None, groups=None):
    with pyro.plate("area", y.shape[0], subsample_size=areas, dim=-2) as i:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("group", y.shape[1], subsample_size=groups, dim=-1) as j:
            g = pyro.sample("g", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(g.unsqueeze(-1), 1.0).to_event(1), obs=y[i][:, j])


def crossed(y):
    rows, columns = pyro.plate("row", y.shape[0], dim=-2), pyro.plate("column", y.shape[1], dim=-1)
    with rows:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with columns:
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with rows, columns:
        pyro.sample("y", dist.Normal((u * v).sum(-1), 1.0), obs=y)


def counties(features, y, county, size=5):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("county", size):
        alpha = pyro.sample("alpha", dist.Normal(mean, 1.0))
    with pyro.plate("house", len(y)):
        pyro.sample("y", dist.Normal(alpha[..., county] + features.sum(-1), 1.0), obs=y)


def by_county(features, y, county, size=5):
    return {"features": features, "y": y}, county


HOUSES = data(7, 2), data(7, seed=1), torch.tensor([0, 0, 1, 3, 3, 3, 0])


def trained(guide, model, *args, steps=10, lr=0.02):
    svi = SVI(model, guide, optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


def encoders(guide):
    network = guide.network
    return {
        site: None if part.encoder is None else type(network.encoders[part.encoder])
        for part in network.parts
        for site in part.group.sites
    }


# --- more plates than the group


def test_nested_plates_are_pooled_and_conditioned_on():
    guide = AmortizedGuide(nested).setup(data(4, 5, 3))
    assert encoders(guide) == {"a": DeepSet, "g": MLP}
    assert [part.upstream for part in guide.network.parts] == [(), (0,)]


@pytest.mark.parametrize("encoder", [DeepSet, SetTransformer])
def test_the_order_of_pooled_elements_does_not_matter(encoder):
    y = data(4, 5, 3).double()
    with_order = torch.tensor([3, 0, 4, 1, 2])
    torch.set_default_dtype(torch.float64)
    try:
        guide = trained(AmortizedGuide(nested, encoder={"a": encoder(16)}), nested, y)
        one, other = guide.median(y), guide.median(y[:, with_order])
        torch.testing.assert_close(one["a"], other["a"], rtol=0, atol=1e-12)
        torch.testing.assert_close(one["g"][:, with_order], other["g"], rtol=0, atol=1e-12)
        flat = trained(AmortizedGuide(nested, encoder={"a": MLP(16)}), nested, y)
        assert not torch.allclose(flat.median(y)["a"], flat.median(y[:, with_order])["a"])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_subsample_sees_all_that_is_pooled():
    y = data(6, 5, 3)
    guide = trained(AmortizedGuide(nested), nested, y, 4, 2)
    contexts = []
    guide.network.encoders[0].register_forward_hook(lambda _, inputs, __: contexts.append(inputs[0]))
    trace = poutine.trace(guide).get_trace(y, 4, 2)
    assert trace.nodes["a"]["value"].shape == (4, 1)
    assert trace.nodes["g"]["value"].shape == (4, 2)
    rows = y[trace.nodes["area"]["value"]]
    torch.testing.assert_close(contexts[0], rows.reshape(20, 3))


def test_what_is_pooled_must_be_complete():
    def model(y, groups):
        with pyro.plate("area", y.shape[0], dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("group", groups, subsample_size=y.shape[1], dim=-1):
                pyro.sample("g", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(a.unsqueeze(-1), 1.0).to_event(1), obs=y)

    guide = AmortizedGuide(model).setup(data(4, 5, 3), 5)
    with pytest.raises(ValueError, match="has 2 rows of plate 'group', which has 5; latents outside"):
        guide(data(4, 2, 3), 5)
    with pytest.raises(ValueError, match="plate 'group' has size 0"):
        guide(data(4, 0, 3), 0)


def test_masked_elements_are_left_out():
    def model(y, there):
        with pyro.plate("area", y.shape[0], dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("group", y.shape[1], dim=-1), poutine.mask(mask=there):
                pyro.sample("g", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y, there = data(3, 4), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    other = torch.where(there, y, y + 7.0)
    guide = trained(AmortizedGuide(model), model, y, there)
    torch.testing.assert_close(guide.median(y, there)["a"], guide.median(other, there)["a"])
    assert not torch.allclose(guide.median(y, ~there)["a"], guide.median(other, ~there)["a"])
    narrow = guide.median(y[1:2, :1], there[1:2, :1])["a"]
    torch.testing.assert_close(guide.median(y, there)["a"][1:2], narrow, rtol=1e-4, atol=1e-5)


def test_features_that_the_model_masks_are_missing():
    def model(y, there):
        with pyro.plate("row", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("column", y.shape[1], dim=-1), poutine.mask(mask=there):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y, there = data(6, 4), data(6, 4, seed=1) > -0.5
    guide = trained(AmortizedGuide(model), model, y, there)
    held_out = torch.where(there, y, y + 7.0)
    torch.testing.assert_close(guide.median(y, there)["z"], guide.median(held_out, there)["z"])
    assert guide.network.encoders[0].standardize.missing
    explicit = AmortizedGuide(lambda y, there: model(y, there), inputs=lambda y, there: {"y": y, "m": there})
    explicit.setup(y, there)
    torch.testing.assert_close(explicit.median(y, there)["z"], explicit.median(held_out, there)["z"])
    with pytest.raises(ValueError, match=r"mask of .* has 3 rows in dimension 0"):
        explicit(y, there[:3])


def test_rows_that_fit_two_plates_are_not_guessed_at():
    def model(x):
        with pyro.plate("left", 4, dim=-2):
            pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("right", 4, dim=-1):
            pyro.sample("v", dist.Normal(0.0, 1.0))

    x = data(4, 2)
    with pytest.raises(
        ValueError, match=r"may be the plates \['left'\] or \['right'\]; name it with amortize="
    ):
        AmortizedGuide(model).setup(x)
    assert encoders(AmortizedGuide(model, amortize=["right"]).setup(x)) == {"u": None, "v": MLP}
    guide = AmortizedGuide(model, inputs={"left": lambda x: x, "right": lambda x: x[:, :1]}).setup(x)
    assert encoders(guide) == {"u": MLP, "v": MLP}


# --- crossed plates, and fewer plates than the group


def test_crossed_plates_take_each_other_for_features():
    guide = AmortizedGuide(crossed).setup(data(6, 4))
    assert encoders(guide) == {"u": MLP, "v": None}
    both = AmortizedGuide(crossed, encoder={"row": DeepSet(16), "column": DeepSet(16)}).setup(data(6, 4))
    assert encoders(both) == {"u": DeepSet, "v": DeepSet}
    assert both(data(9, 3))["v"].shape == (3, 2)


def test_equal_sizes_are_told_apart_by_what_is_observed():
    guide = AmortizedGuide(crossed, encoder={"column": DeepSet(16)}).setup(data(5, 5))
    assert [part.encodings[0].plates for part in guide.network.parts] == [("row",), ("column",)]
    y, row = data(5, 5), torch.zeros(5, 5)
    row[2] = 3.0
    trained(guide, crossed, y)
    change = {k: (guide.median(y + row)[k] - v).abs().flatten(1).amax(-1) for k, v in guide.median(y).items()}
    assert (change["u"].flatten() > 0).tolist() == [False, False, True, False, False]


def test_a_plate_that_the_inputs_lack_has_parameters_per_element():
    def model(x):
        with pyro.plate("row", len(x), dim=-1), pyro.plate("item", 4, subsample_size=2, dim=-2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.arange(4.0)[i].unsqueeze(-1).expand(2, len(x)))

    x = data(5, 2)
    guide = trained(AmortizedGuide(model), model, x, steps=400, lr=5e-3)
    assert guide.network.heads[0].offset.shape == (4, 1, 2)
    assert guide.median(x)["z"].shape == (4, 5)
    exact = torch.arange(4.0).unsqueeze(-1).expand(4, 5) / 1.25
    assert (guide.median(x)["z"] - exact).abs().max() < 0.2
    guide = AmortizedGuide(with_items).setup(x, 4)
    with pytest.raises(
        ValueError, match=r"learned per element of plate 'item'.* 4 elements, this call has 6"
    ):
        guide(x, 6)


def with_items(x, n):
    with pyro.plate("row", len(x), dim=-1), pyro.plate("item", n, dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_upper_contexts_reach_groups_that_do_not_see_upper_values():
    y = data(4, 5, 3)
    for condition, count in ((True, 1), (False, 2)):
        guide = AmortizedGuide(nested, condition_on_upstream=condition).setup(y)
        _, lower = guide.network.parts
        assert len(lower.encodings) == count
        assert lower.upstream == ((0,) if condition else ())
    trained(guide, nested, y)
    other = y.clone()
    other[2, 0] += 2.0
    moved = (guide.median(other)["g"] - guide.median(y)["g"]).abs() > 1e-6
    assert moved[2].all()
    assert not moved[[0, 1, 3]].any()


# --- ragged groups


def test_ragged_groups_are_pooled_by_index():
    guide = trained(AmortizedGuide(counties, inputs=by_county), counties, *HOUSES)
    assert encoders(guide) == {"mean": None, "alpha": DeepSet}
    order = torch.tensor([6, 3, 2, 0, 5, 1, 4])
    shuffled = [x[order] for x in HOUSES]
    torch.testing.assert_close(guide.median(*HOUSES)["alpha"], guide.median(*shuffled)["alpha"])
    features, y, county = HOUSES
    alone = guide.median(features[county == 3], y[county == 3], torch.zeros(3, dtype=torch.long))["alpha"]
    torch.testing.assert_close(guide.median(*HOUSES)["alpha"][3], alone[0])
    empty = guide.median(*HOUSES)["alpha"][[2, 4]]
    torch.testing.assert_close(empty, alone[1:3])
    assert guide.median(*HOUSES, 8)["alpha"].shape == (8,)  # more of them than before


def test_ragged_groups_can_be_subsampled():
    def model(features, y, county):
        with pyro.plate("county", 5, subsample_size=2) as index:
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        there = (county.unsqueeze(-1) == index).any(-1)
        position = (county.unsqueeze(-1) == index).float().argmax(-1)
        with pyro.plate("house", len(y)), poutine.mask(mask=there), poutine.scale(scale=2.5):
            pyro.sample("y", dist.Normal(alpha[..., position], 1.0), obs=y)

    guide = trained(AmortizedGuide(model, inputs=by_county), model, *HOUSES)
    full = AmortizedGuide(counties, inputs=by_county).setup(*HOUSES)
    elements = []
    guide.network.encoders[0].register_forward_pre_hook(lambda _, inputs: elements.append(inputs))
    trace = poutine.trace(guide).get_trace(*HOUSES)
    [(rows, index, count)] = elements
    chosen = trace.nodes["county"]["value"]
    assert count == 2
    assert len(rows) == sum(int((HOUSES[2] == c).sum()) for c in chosen)
    torch.testing.assert_close(chosen[index], HOUSES[2][(HOUSES[2].unsqueeze(-1) == chosen).any(-1)])
    assert full(*HOUSES)["alpha"].shape == (5,)


def test_bad_indices_are_refused():
    features, y, county = HOUSES

    def setup(index, inputs=by_county, **options):
        AmortizedGuide(counties, inputs=inputs, **options).setup(features, y, index)

    def wrong(change):
        return lambda features, y, county, size=5: ({"f": features, "y": y}, change(county))

    for change, error, message in (
        (lambda i: i + 2, ValueError, "runs from 2 to 5, but plate 'county' has 5 elements, from 0 to 4"),
        (lambda i: i - 1, ValueError, "runs from -1 to 2"),
        (lambda i: i[:3], ValueError, r"index .* has shape \(3,\), expected .* \(7,\)"),
        (lambda i: i.float(), TypeError, r"expected \(features, index\) with an integer tensor"),
    ):
        with pytest.raises(error, match=message):
            setup(county, wrong(change))
    with pytest.raises(ValueError, match=r"which may count .* \['county', 'state'\]; say which ones"):
        AmortizedGuide(two_levels, inputs=by_county).setup(features, y, county)
    guide = AmortizedGuide(two_levels, inputs={"county": by_county, "state": by_county})
    assert encoders(guide.setup(features, y, county)) == {"s": DeepSet, "c": DeepSet}
    with pytest.raises(ValueError, match=r"comes with an index.* MLP takes one row each: take a DeepSet"):
        setup(county, encoder={"county": MLP()})


def two_levels(features, y, county):
    with pyro.plate("state", 4):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 5):
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("house", len(y)):
        pyro.sample("y", dist.Normal(s[..., county] + c[..., county], 1.0), obs=y)


# --- whole data sets


def linear(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("particles", [1, 4])
def test_many_data_sets_at_once(particles):
    x = data(6, 3)

    def many(function):
        def run(x):
            with pyro.plate("data set", len(x)):
                return function(x)

        return run

    guide = AmortizedGuide(linear, encoder=MLP(32)).setup(x[0])
    assert guide(x[0])["theta"].shape == (3,)
    elbo = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(many(linear), many(guide), optim.Adam({"lr": 0.01}), elbo)
    for _ in range(250):
        svi.step(torch.randn(32, 3) * 1.25**0.5)
    exact = x / 1.25
    alone = torch.stack([guide.median(row)["theta"] for row in x])
    assert (alone - exact).abs().max() < 0.15
    drawn = torch.stack([many(guide)(x)["theta"] for _ in range(200)])
    assert drawn.shape == (200, 6, 3)
    assert (drawn.mean(0) - alone).abs().max() < 0.2  # 5 standard errors
    with pytest.raises(ValueError, match="expected the plates"):
        guide(x)


def sensors(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("sensor", x.shape[-1]):
        pyro.sample("x", dist.Normal(theta, 0.5), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "encoder"), [(linear, MLP), (sensors, DeepSet)])
def test_training_on_simulated_data_sets(model, encoder):
    depth = int(model is sensors)
    x = data(10) + 0.5 if depth else data(3)
    exact = x.sum() * 4.0 / 41.0 if depth else x / 1.25
    guide = AmortizedGuide(model, encoder=encoder(32)).setup(x)
    elbo = ReweightedWakeSleep(
        num_particles=2, insomnia=0.0, model_has_params=False, num_sleep_particles=64,
        vectorize_particles=True, max_plate_nesting=depth,
    )  # fmt: skip
    svi = SVI(model, guide, optim.Adam({"lr": 5e-3}), elbo)
    for _ in range(300):
        svi.step(x)
    assert (guide.median(x)["theta"] - exact).abs().max() < 0.25


def test_a_global_can_be_amortized_over_pooled_rows():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = AmortizedGuide(model, encoder=DeepSet(16)).setup(data(9))
    assert encoders(guide) == {"mean": DeepSet}
    guide = AmortizedGuide(model, encoder={"mean": DeepSet(16)}).setup(data(9))
    assert guide(data(4))["mean"].shape == ()


def test_a_set_encoder_of_ones_own():
    class Sum(SetEncoder):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, elements, index, count):
            values = self.linear(elements)
            return values.new_zeros(count, 4).index_add(0, index, values)

    y = data(4, 5, 3)
    guide = trained(AmortizedGuide(nested, encoder={"a": Sum()}), nested, y)
    assert encoders(guide) == {"a": Sum, "g": MLP}
    with pytest.raises(ValueError, match="no set to pool"):
        AmortizedGuide(counties_of_rows, encoder={"z": DeepSet()}).setup(data(4))


def counties_of_rows(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_plate_that_only_observations_show_is_met_in_every_reading():
    """A scale makes the model be read again at every call, up to the last latent; here, beyond it."""

    def model(y):
        with pyro.plate("area", 4, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("group", 3, dim=-1):
                pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y = data(4, 3)
    guide = AmortizedGuide(poutine.scale(model, scale=0.5), encoder=DeepSet(8))
    assert [guide(y)["a"].shape for _ in range(2)] == [(4, 1)] * 2
