"""Latents whose names run on with a number: one family per step, given the step before."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DiagonalNormal,
    Discrete,
    FullRankNormal,
    GRUEncoder,
    NormalizingFlow,
    NormalMixture,
    optim,
)
from tests.problems import state_space

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in guide but not model")


def chain(x):
    with pyro.plate("series", x.shape[0], dim=-1):
        z = torch.zeros(2)
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5).to_event(1), obs=x[:, t - 1])


def switching(x):
    with pyro.plate("series", x.shape[0], dim=-1):
        s = z = torch.zeros(())
        for t in range(x.shape[1]):
            s = pyro.sample(f"s_{t}", dist.Bernoulli(0.2 + 0.6 * s))
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z + s, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


def with_levels(x):
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.3))
    with pyro.plate("series", x.shape[0], dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        z = torch.zeros(())
        for t in range(x.shape[1]):
            z = pyro.sample(f"z{t}", dist.Normal(0.9 * z + level, noise))
            pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def links(guide):
    titles = [part.group.names for part in guide.network.parts]
    return {
        titles[i][0]: (
            [titles[j][0] for j in part.links.upstream],
            [titles[j][0] for j in part.links.previous],
        )
        for i, part in enumerate(guide.network.parts)
    }


def trained(guide, model, x, steps=3, elbo=None):
    svi = SVI(model, guide, optim.Adam({"lr": 0.02}), elbo or Trace_ELBO())
    for _ in range(steps):
        svi.step(x)
    return guide


def test_one_set_of_parameters_serves_any_number_of_steps():
    guide = AmortizedGuide(chain).setup(data(4, 6, 2))
    [part] = guide.network.parts
    assert part.group.running
    assert isinstance(guide.network.encoders[0], GRUEncoder)
    count = sum(p.numel() for p in guide.parameters())
    for steps in (6, 1, 13, 6):
        svi = SVI(chain, guide, optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert svi.step(data(4, steps, 2)) > 0
        names = [f"z_{t}" for t in range(1, steps + 1)]
        assert list(guide(data(4, steps, 2))) == names
    longer = AmortizedGuide(chain).setup(data(4, 20, 2))
    assert sum(p.numel() for p in longer.parameters()) == count == sum(p.numel() for p in guide.parameters())


@pytest.mark.parametrize(
    "family", [DiagonalNormal(), FullRankNormal(), NormalMixture(2), NormalizingFlow(hidden=(8,))]
)
def test_log_q_is_the_product_over_steps(family):
    torch.set_default_dtype(torch.float64)
    try:
        x = data(3, 5, 2).double()
        guide = trained(AmortizedGuide(chain, family=family), chain, x)
        posterior = guide.posterior(x, num_draws=4)
        network = guide.network
        encoder, head, bound = network.encoders[0], network.heads[0], network.families[0]
        contexts = encoder(x, None)
        by_hand = torch.zeros(4, 3)
        for t in range(1, 6):
            first = torch.full((4, 3, 1), float(t == 1))
            before = posterior.draws[f"z_{t - 1}"] if t > 1 else head.origin[:2].expand(4, 3, 2)
            parameters = head(contexts[:, t - 1], torch.cat([before, first], -1), {})
            by_hand += bound(parameters).log_prob(posterior.draws[f"z_{t}"])
        torch.testing.assert_close(posterior.log_q, by_hand)
        torch.testing.assert_close(posterior.log_prob(posterior.draws), by_hand)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_depends_on_the_draw_before_it():
    x = data(3, 6, 2)
    guide = trained(AmortizedGuide(chain), chain, x, 30)
    values = guide.median(x)
    moved = {**values, "z_3": values["z_3"] + 1.0}
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(x)
    other = poutine.trace(poutine.condition(guide, data=moved)).get_trace(x)
    for one in (trace, other):
        one.compute_log_prob()
    scores = [[one.nodes[f"z_{t}"]["log_prob"] for t in range(1, 7)] for one in (trace, other)]
    assert [torch.equal(a, b) for a, b in zip(*scores, strict=True)] == [True, True, False, False, True, True]


def test_a_causal_encoder_does_not_see_the_future():
    x = data(3, 6, 2)
    later = x.clone()
    later[:, 4:] += 1.0
    for causal in (True, False):
        guide = trained(AmortizedGuide(chain, encoder=GRUEncoder(16, causal=causal)), chain, x, 5)
        one, other = (guide.median(rows) for rows in (x, later))
        assert torch.equal(one["z_4"], other["z_4"]) == causal
        assert not torch.equal(one["z_5"], other["z_5"])


def test_sequences_that_step_together_take_turns():
    x = data(4, 5)
    guide = AmortizedGuide(switching).setup(x)
    assert links(guide) == {"s": ([], ["s", "z"]), "z": (["s"], ["z"])}
    names = list(poutine.trace(guide).get_trace(data(4, 3)).stochastic_nodes)[1:]
    assert names == ["s_0", "z_0", "s_1", "z_1", "s_2", "z_2"]
    trained(guide, switching, x, elbo=TraceGraph_ELBO())
    summed = AmortizedGuide(switching, family={"s": Discrete(enumerate="parallel")})
    trained(summed, switching, data(4, 3), elbo=TraceEnum_ELBO(max_plate_nesting=1))


def test_levels_and_globals_condition_a_sequence():
    x = data(4, 6)
    guide = trained(AmortizedGuide(with_levels), with_levels, x)
    assert links(guide) == {"noise": ([], []), "level": (["noise"], []), "z": (["noise", "level"], ["z"])}
    assert len(guide.network.encoders) == 1  # the level reads the sequence as a whole
    assert guide.posterior(data(2, 9), num_draws=3).draws["level"].shape == (3, 2)


def test_padding_and_what_stands_in_it_change_nothing():
    x, lengths = data(6, 8, 3), torch.tensor([8, 3, 5, 1, 8, 2])
    padded = state_space.pad(x, lengths)
    guide = AmortizedGuide(state_space.padded_model).setup(padded, lengths)
    svi = SVI(state_space.padded_model, guide, optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(3):
        svi.step(padded, lengths)
    wide = torch.cat([padded, torch.full((6, 4, 3), 9.0)], dim=1)
    expected, got = guide.median(padded, lengths), guide.median(wide, lengths)
    alone = [guide.median(x[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths)]
    for t in range(1, 9):
        there = lengths >= t
        torch.testing.assert_close(got[f"z_{t}"][there], expected[f"z_{t}"][there], rtol=0, atol=0)
        for i in there.nonzero().flatten():
            torch.testing.assert_close(expected[f"z_{t}"][i], alone[i][f"z_{t}"][0], rtol=1e-4, atol=1e-5)


def test_a_mask_can_come_with_the_inputs():
    x, lengths = data(3, 5, 2), torch.tensor([5, 2, 4])
    there = torch.arange(5) < lengths.unsqueeze(-1)

    def model(x, there):
        chain(x)

    guide = AmortizedGuide(model, inputs=lambda x, there: {"x": x, "there": there})
    guide.setup(x, there)
    spoilt = torch.where(there.unsqueeze(-1), x, torch.full_like(x, torch.nan))
    for name, value in guide.median(x, there).items():
        torch.testing.assert_close(guide.median(spoilt, there)[name], value)
    with pytest.raises(ValueError, match="gaps; absent steps must come last"):
        guide(x, there.flip(1))
    with pytest.raises(ValueError, match=r"mask of .* has shape \(3, 4\)"):
        guide(x, there[:, :4])


def test_other_encoders_take_the_whole_sequence_and_one_family_draws_it():
    x = data(4, 5, 2)
    guide = AmortizedGuide(chain, encoder=MLP(16)).setup(x)
    [part] = guide.network.parts
    assert part.group.sites == tuple(f"z_{t}" for t in range(1, 6))
    assert part.group.size == 10
    assert AmortizedGuide(chain, amortize=()).setup(x).network.parts[0].group.size == 10


def test_a_site_of_a_sequence_can_have_a_group_of_its_own():
    x = data(4, 5, 2)
    guide = AmortizedGuide(chain, family={"z_1": NormalMixture(2), "z": DiagonalNormal()}).setup(x)
    assert [part.group.names for part in guide.network.parts] == [("z_1",), ("z",)]
    assert [type(family) for family in guide.families] == [NormalMixture, DiagonalNormal]


def test_a_sequence_may_start_before_the_data():
    def model(x):
        with pyro.plate("series", len(x), dim=-1):
            z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
            for t in range(1, x.shape[1] + 1):
                z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5))
                pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t - 1])

    guide = trained(AmortizedGuide(model), model, data(3, 5))
    assert len(guide(data(3, 8))) == 9
    other = AmortizedGuide(lambda x, y: model(x), inputs=lambda x, y: y).setup(data(3, 5), data(3, 5))
    with pytest.raises(ValueError, match=r"8 steps, but .* has 6 latents like .z_0., expected 5"):
        other(data(3, 5), data(3, 8))


def test_a_single_series_needs_no_plate():
    def model(x):
        z = torch.zeros(())
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[t])

    guide = trained(AmortizedGuide(model, GRUEncoder(16)), model, data(7))
    assert guide(data(11))["z_10"].shape == ()
    assert AmortizedGuide(model).setup(data(7)).network.parts[0].encoder is None


def test_promotion_and_copies_keep_a_sequence():
    x = data(4, 5, 2)
    guide = trained(AmortizedGuide(chain, family=DiagonalNormal()), chain, x)
    richer = guide.promote(FullRankNormal())
    values = guide(x)
    assert guide.promote({"z": FullRankNormal()}).families == richer.families
    for other in (richer, copy.deepcopy(guide)):
        torch.testing.assert_close(other.log_prob(values, x), guide.log_prob(values, x), rtol=1e-4, atol=1e-4)
    trained(richer, chain, data(4, 9, 2))


def test_masks_that_depend_on_draws_follow_every_step():
    def model(x):
        with pyro.plate("series", x.shape[0], dim=-1):
            there = torch.ones(x.shape[0])
            z = torch.zeros(())
            for t in range(x.shape[1]):
                there = pyro.sample(f"there_{t}", dist.Bernoulli(0.7 * there))
                with poutine.mask(mask=there.bool()):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z * there, 1.0), obs=x[:, t])

    guide = trained(AmortizedGuide(model), model, data(20, 3), elbo=TraceGraph_ELBO())
    trace = poutine.trace(guide).get_trace(data(20, 6))
    for t in range(6):
        there = trace.nodes[f"there_{t}"]["value"].bool()
        assert torch.equal(trace.nodes[f"z_{t}"]["mask"], there)
    assert not there.all()


def test_what_cannot_be_a_sequence_is_refused():
    def gap(x):
        with pyro.plate("series", len(x), dim=-1):
            z = torch.zeros(())
            for t in (1, 2, 4):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t - 1])

    with pytest.raises(ValueError, match="'z' has gaps in its numbers: z_3 is missing between z_1 and z_4"):
        AmortizedGuide(gap).setup(data(3, 4))
    guide = AmortizedGuide(chain).setup(data(3, 4, 2))
    with pytest.raises(ValueError, match="the sequence 'z' has no steps"):
        guide(data(3, 0, 2))
    with pytest.raises(ValueError, match=r"have 4 steps, but .* has 5"):
        AmortizedGuide(chain, GRUEncoder(), inputs=lambda x: torch.cat([x, x[:, :1]], 1)).setup(data(3, 4, 2))


def test_numbered_latents_that_do_not_follow_each_other_are_no_sequence():
    def layers(x):
        with pyro.plate("rows", len(x)):
            total = sum(pyro.sample(f"w_{i}", dist.Normal(0.0, 1.0)) for i in range(3))
            pyro.sample("x", dist.Normal(total.unsqueeze(-1), 1.0).to_event(1), obs=x)

    [part] = AmortizedGuide(layers).setup(data(5, 3)).network.parts
    assert part.group.sites == ("w_0", "w_1", "w_2")
