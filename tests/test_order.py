"""What is drawn first, what sees what, and what a call observes instead of drawing it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_mean

from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, NormalMixture, optim


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labelled(x, y=None):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), obs=y)
        pyro.sample("x", dist.Normal(torch.cat([z, y], -1), 0.5).to_event(1), obs=x)


def chain(x, b=None, hidden=False):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if not hidden:
        b = pyro.sample("b", dist.LogNormal(a, 1.0), obs=b)
    c = pyro.sample("c", dist.Normal(a if b is None else b, 1.0))
    pyro.sample("x", dist.Normal(c, 1.0), obs=x)


APART = {name: FullRankNormal() for name in "abc"}
X, LABELS = data(6, 5), torch.eye(3)[[0, 1, 2, 0, 1, 2]]


def links(guide):
    groups = [part.group.names for part in guide.network.parts]
    return {
        group: [groups[i] for i in part.upstream]
        for group, part in zip(groups, guide.network.parts, strict=True)
    }


def trained(guide, model, *args, steps=20, elbo=None):
    svi = SVI(model, guide, optim.Adam({"lr": 0.02}), elbo or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


# --- order and given


def test_the_models_order_is_the_default():
    assert links(AmortizedGuide(labelled).setup(X)) == {("z",): [], ("y",): [("z",)]}
    assert links(AmortizedGuide(chain, family=APART).setup(data())) == {
        ("a",): [],
        ("b",): [("a",)],
        ("c",): [("b",)],
    }


def test_another_order_and_what_follows_from_it():
    assert links(AmortizedGuide(labelled, order=["y", "z"]).setup(X)) == {("y",): [], ("z",): [("y",)]}
    guide = AmortizedGuide(chain, family=APART, order=["c", "b", "a"]).setup(data())
    assert links(guide) == {("c",): [], ("b",): [("c",)], ("a",): [("b",)]}
    assert list(poutine.trace(guide).get_trace(data()).stochastic_nodes) == ["c", "b", "a"]
    trained(guide, chain, data())


def test_given_decides_alone():
    guide = AmortizedGuide(chain, given={"c": ["a"], "b": []}).setup(data())
    assert links(guide) == {("a",): [], ("b",): [], ("c",): [("a",)]}
    assert links(AmortizedGuide(labelled, given={"z": ["y"]}).setup(X)) == {("y",): [], ("z",): [("y",)]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"given": {"a": ["b"], "b": ["a"]}}, ValueError, "makes a cycle among"),
        ({"given": {"a": ["a"]}}, ValueError, "makes 'a' depend on itself"),
        ({"given": {"a": ["d"]}}, ValueError, r"given names \['d'\], but the latents of this call"),
        ({"given": {"a": "b"}}, TypeError, "given must be a dict"),
        ({"order": ["a", "b"]}, ValueError, r"order must name every latent, but \['c'\] are missing"),
        ({"order": ["a", "b", "b", "c"]}, ValueError, "names a latent twice"),
        ({"order": ["a", "b", "c", "d"]}, ValueError, r"order names \['d'\]"),
        ({"order": "abc"}, TypeError, "order must be a list"),
        ({"order": ["a", "b", "c"], "given": {"a": ["c"]}}, ValueError, "draws a latent before one that"),
    ],
)
def test_contradictions_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        AmortizedGuide(chain, **options).setup(data())


def test_values_in_other_plates_are_taken_in_whole_where_these_are_fixed():
    def mixture(x, size=3):
        with pyro.plate("component", size, dim=-1):
            mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("row", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(size)))
            pyro.sample("x", dist.Normal(mean[..., k, :], 0.3).to_event(1), obs=x)

    x = data(8, 2)
    guide = AmortizedGuide(mixture).setup(x)
    assert links(guide) == {("mean",): [], ("k",): [("mean",)]}
    assert guide.network.heads[1].origin.shape == (6,)
    trained(guide, mixture, x, elbo=TraceGraph_ELBO())
    means = guide(x)["mean"]
    one = {"mean": means, "k": torch.zeros(8, dtype=torch.long)}
    other = {"mean": means.flip(0), "k": one["k"]}
    assert not torch.allclose(guide.log_prob(one, x), guide.log_prob(other, x))
    with pytest.raises(ValueError, match=r"learned per element of the plates \['component'\]"):
        guide(x, 4)
    with pytest.raises(
        ValueError, match=r"depend on latents 'k', but the elements of their plates \['row'\]"
    ):
        AmortizedGuide(mixture, given={"mean": ["k"]}).setup(x)


# --- sites that are observed or absent in some calls


def test_half_observed_labels():
    guide = AmortizedGuide(labelled, order=["y", "z"]).setup(X)
    assert guide(X).keys() == {"y", "z"}
    assert guide(X, LABELS).keys() == {"z"}
    svi = SVI(labelled, guide, optim.Adam({"lr": 0.02}), TraceGraph_ELBO())
    for _ in range(20):
        svi.step(X)
        svi.step(X, LABELS)
    torch.manual_seed(0)
    given = poutine.trace(poutine.condition(guide, data={"y": LABELS})).get_trace(X)
    torch.manual_seed(0)
    observed = poutine.trace(guide).get_trace(X, LABELS)
    for trace in (given, observed):
        trace.compute_log_prob()
    values = {"z": observed.nodes["z"]["value"]}
    expected = guide.log_prob({**values, "y": LABELS}, X) - given.nodes["y"]["log_prob"]
    torch.testing.assert_close(guide.log_prob(values, X, LABELS), expected, rtol=1e-4, atol=1e-4)
    other = guide.log_prob(values, X, LABELS.roll(1, 0))
    assert not torch.allclose(other, expected)
    assert guide.posterior(X, LABELS, num_draws=7).log_p.shape == (7, 6)


def test_a_half_observed_continuous_site_is_conditioned_on_in_its_unconstrained_value():
    guide = trained(AmortizedGuide(chain, family=APART), chain, data())
    value = torch.tensor(2.5)
    observed = poutine.trace(guide).get_trace(data(), value)
    assert set(observed.stochastic_nodes) == {"a", "c"}
    observed.compute_log_prob()
    values = {name: observed.nodes[name]["value"] for name in "ac"} | {"b": value}
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(data())
    trace.compute_log_prob()
    torch.testing.assert_close(observed.nodes["c"]["log_prob"], trace.nodes["c"]["log_prob"])


def test_an_observed_value_that_is_computed_is_read_at_every_call():
    def model(x, y=None):
        return labelled(x, None if y is None else y.flip(-1))

    guide = trained(AmortizedGuide(model, order=["y", "z"]), model, X, elbo=TraceGraph_ELBO())
    values = {"z": data(6, 2)}
    one, other = guide.log_prob(values, X, LABELS), guide.log_prob(values, X, LABELS.roll(1, 0))
    assert not torch.allclose(one, other)
    again = AmortizedGuide(labelled, order=["y", "z"]).setup(X)
    again.load_state_dict(guide.state_dict())
    torch.testing.assert_close(one, again.log_prob(values, X, LABELS.flip(-1)))


def test_a_site_that_is_absent_is_left_out():
    guide = trained(AmortizedGuide(chain, family=APART), chain, data())
    assert guide(data(), hidden=True).keys() == {"a", "c"}
    values = {name: guide(data())[name] for name in "ac"}
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(data(), hidden=True)
    trace.compute_log_prob()
    total = trace.nodes["a"]["log_prob"] + trace.nodes["c"]["log_prob"]
    torch.testing.assert_close(guide.log_prob(values, data(), hidden=True), total)
    trained(guide, chain, data(), steps=1)


def test_what_is_drawn_jointly_is_observed_jointly():
    guide = AmortizedGuide(chain).setup(data())
    with pytest.raises(ValueError, match=r"drawn jointly, .* does not sample 'b'.* family={'b': \.\.\.}"):
        guide(data(), torch.tensor(1.0))


def test_observation_masks_tell_the_encoder_what_is_missing():
    def model(y, there):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y, obs_mask=there)

    y, there = data(8), data(8, seed=1) > -0.3
    guide = trained(AmortizedGuide(model), model, y, there)
    assert set(guide(y, there)) == {"z", "y_unobserved"}
    other = torch.where(there, y, torch.tensor(4.0))
    values = guide(y, there)
    torch.testing.assert_close(guide.log_prob(values, y, there), guide.log_prob(values, other, there))


# --- what users bring


def test_a_hand_written_part_in_a_list():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_hand(x):
        loc = pyro.param("scale_loc", torch.tensor(0.0))
        return {"scale": pyro.sample("scale", dist.LogNormal(loc, 0.1))}

    for first in (by_hand, AutoNormal(poutine.block(model, expose=["scale"]))):
        guide = AutoGuideList(model)
        guide.append(first)
        guide.append(AmortizedGuide(poutine.block(model, hide=["scale"])))
        trained(guide, model, data(9), steps=2)
        assert {"scale", "z"} <= set(guide(data(9)))


def test_a_family_of_ones_own():
    class Tight(DiagonalNormal):
        def bind(self, size):
            bound = super().bind(size)
            initial = bound.initial
            bound.initial = lambda loc, scale: initial(loc, 1e-3)
            return bound

    draws = AmortizedGuide(labelled, family=Tight()).setup(X).posterior(X).sd()["z"]
    assert (draws < 0.01).all()
    mixed = AmortizedGuide(labelled, family={"z": NormalMixture(2)}).setup(X)
    assert isinstance(mixed.families[0], NormalMixture)


def test_a_mask_inside_an_event_follows_the_draw_it_depends_on():
    def model(x):
        with pyro.plate("row", len(x)):
            n = pyro.sample("n", dist.Categorical(torch.ones(3) / 3))
            there = torch.arange(2) < n.unsqueeze(-1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).mask(there).to_event(1))
            pyro.sample("x", dist.Normal((there * z).sum(-1) + n, 0.5), obs=x)

    x = data(4)
    guide = AmortizedGuide(model, init_scale=1.0, init_loc_fn=init_to_mean).setup(x)
    for n in range(3):
        values = [{"n": torch.full((4,), n), "z": torch.full((4, 2), z)} for z in (1.0, 2.0)]
        change = guide.log_prob(values[0], x) - guide.log_prob(values[1], x)
        torch.testing.assert_close(change, torch.full((4,), 1.5 * n))


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_global_that_sees_a_whole_plate_keeps_its_shape(dim):
    def model(x):
        with pyro.plate("component", 3, dim=dim):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc.sum() + shift, 1.0), obs=x)

    guide = AmortizedGuide(model).setup(torch.tensor(0.5))
    assert [part.upstream for part in guide.network.parts] == [(), (0,)]
    assert guide(torch.tensor(0.5))["shift"].shape == ()
    with pyro.plate("particles", 7, dim=-3):
        assert guide(torch.tensor(0.5))["shift"].shape == (7, 1, 1)
