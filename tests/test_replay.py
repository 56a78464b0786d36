"""A guide scores any values exactly, and serves wherever Pyro expects an autoguide.

Scores are compared with hand-written ones at the same values, to 1e-8. Seed 0 everywhere.
"""

import copy
import io
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import Recorder, log_q_by_hand
from models import (
    FAMILIES,
    PRIORS,
    ZOO,
    Local,
    Outer,
    Regression,
    by_every_family,
    by_family,
    chosen,
    hierarchy,
    mixed,
    normal_rows,
    prepared,
    rows,
    small_encoder,
    two,
)
from pyro import poutine
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam
from torch.nn.utils import parameters_to_vector

from pyro_guides import AmortizedGuide

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample:UserWarning")
MODELS = ZOO | {f"Local {name}": (Local(prior(), 20), (rows(),), 1, 5.0) for name, prior in PRIORS.items()}


def total(densities, scale=1.0):
    """The scaled sum of densities by site."""
    by_site = scale if isinstance(scale, dict) else dict.fromkeys([sites[0] for sites in densities], scale)
    return float(sum(by_site.get(sites[0], 1.0) * d.detach().sum() for sites, d in densities.items()))


# --- scores of given values


@pytest.mark.crossed
@pytest.mark.parametrize("particles", [(), (3,), (2, 3)], ids=str)
@by_every_family
@pytest.mark.parametrize("name", MODELS)
def test_the_values_of_a_trace_are_scored_exactly(name, family, particles):
    """Draws of the guide itself, and draws of the model, which the guide has never seen."""
    model, args, depth, scale = MODELS[name]
    guide = prepared(model, *args, family=family)
    with ExitStack() as stack:
        for i, count in enumerate(particles):
            stack.enter_context(pyro.plate(f"particles {i}", count, dim=-1 - depth - i))
        own = poutine.trace(guide).get_trace(*args)
        for trace in (own, poutine.trace(model).get_trace(*args)):
            recorder = Recorder(guide)
            replayed = poutine.trace(poutine.replay(recorder, trace=trace)).get_trace(*args)
            for site in guide.network.parts[0].group.sites:
                assert replayed.nodes[site]["value"] is trace.nodes[site]["value"]
            expected = total(log_q_by_hand(guide, *recorder.calls[0]), scale)
            assert float(replayed.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-8, abs=1e-8)
            if trace is own:
                assert float(own.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-8, abs=1e-8)


@by_every_family
@pytest.mark.parametrize("site", ["center", "spread", "z", "s"])
def test_given_values_of_some_sites_are_scored_with_the_rest(site, family):
    guide = prepared(hierarchy, rows(), family=family)
    value = poutine.trace(hierarchy).get_trace(rows()).nodes[site]["value"]
    recorder = Recorder(guide)
    trace = poutine.trace(poutine.condition(recorder, data={site: value})).get_trace(rows())
    recorded, parameters = recorder.calls[0]
    recorded.nodes[site]["value"] = value
    assert trace.nodes[site]["value"] is value
    expected = total(log_q_by_hand(guide, recorded, parameters))
    assert float(trace.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-8)


@by_every_family
@pytest.mark.parametrize("name", ["hierarchy", "nested", "Local simplex"])
def test_log_prob_is_that_of_the_trace(name, family):
    model, args, _, scale = MODELS[name]
    guide = prepared(model, *args, family=family)
    trace = poutine.trace(guide).get_trace(*args)
    values = {n: trace.nodes[n]["value"] for part in guide.network.parts for n in part.group.sites}
    log_q = guide.log_prob(values, *args)  # of each row, so without the plate's scale
    scale = scale if log_q.dim() else 1.0
    expected = float(trace.log_prob_sum().detach())
    assert float(log_q.sum()) * scale == pytest.approx(expected, rel=1e-8)


def test_control_a_value_in_the_wrong_place_is_seen():
    guide = prepared(normal_rows, rows())
    trace = poutine.trace(guide).get_trace(rows())
    before = float(trace.log_prob_sum().detach())
    other = {"z": trace.nodes["z"]["value"].flip(0)}
    after = poutine.trace(poutine.condition(guide, data=other)).get_trace(rows())
    assert abs(float(after.log_prob_sum().detach()) - before) > 0.1


@pytest.mark.parametrize("amortize", [None, ()], ids=["amortized", "learned"])
@pytest.mark.parametrize("name", MODELS)
def test_particles_around_the_first_call_leave_no_trace(name, amortize):
    model, args, depth, _ = MODELS[name]
    guides = [AmortizedGuide(model, amortize=amortize) for _ in range(2)]
    guides[0].setup(*args)
    with pyro.plate("particles", 3, dim=-1 - depth):
        guides[1](*args)
    alone, around = ({n: p.shape for n, p in guide.named_parameters()} for guide in guides)
    assert alone == around


# --- wake-sleep


@pytest.mark.parametrize("particles", [1, 3])
@by_every_family
@pytest.mark.parametrize("name", ["normal_rows", "hierarchy", "side_by_side", "subsampled_hierarchy"])
def test_sleep_scores_simulated_data(name, family, particles):
    model, args, _, scale = MODELS[name]
    guide = prepared(model, *args, family=family)
    recorder, simulated = Recorder(guide), []
    for encoder in guide.network.encoders:
        encoder.register_forward_pre_hook(lambda _, inputs: simulated.append(inputs[0]))
    options = {"num_sleep_particles": particles, "insomnia": 0.0, "model_has_params": False}
    _, loss = ReweightedWakeSleep(**options).loss(model, recorder, *args)
    expected = -total(log_q_by_hand(guide, *recorder.calls[-1]), scale) / particles
    assert float(loss) == pytest.approx(expected, rel=1e-8)
    for read, given in zip(simulated[-len(args) :], args, strict=True):
        assert read.numel() == particles * given.numel()
        assert not torch.isin(read, given).any()


def test_sleep_needs_data_that_are_arguments():
    guide = prepared(ZOO["left_plate"][0], rows())
    with pytest.raises(ValueError, match="observed site 'x' is not one of the model's arguments"):
        guide(rows(), observations={"x": rows().unsqueeze(-2)})


@pytest.mark.crossed
@by_every_family
@pytest.mark.parametrize("name", [*(f"Local {prior}" for prior in PRIORS), "hierarchy", "crossed"])
def test_wake_weights_the_score_of_detached_values(name, family):
    check_wake(*MODELS[name][:3], family)


def test_control_a_path_through_upstream_values_is_seen(monkeypatch):
    monkeypatch.setattr("pyro_guides.distributions.sites.Joint.scored", lambda self: self.distribution)
    with pytest.raises(AssertionError, match="wake"):
        check_wake(*MODELS["hierarchy"][:3], FAMILIES["full_rank"])


def check_wake(model, args, depth, family):
    guide = prepared(model, *args, family=family)
    rws = ReweightedWakeSleep(num_particles=4, model_has_params=False, max_plate_nesting=depth)
    recorder = Recorder(guide)
    rws.loss_and_grads(model, recorder, *args)
    gradient = parameters_to_vector([p.grad for p in guide.parameters()])
    trace = recorder.calls[-1][0]
    trace.detach_()
    with pyro.plate("num_particles_vectorized", 4, dim=-1 - depth):
        q = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*args)
        p = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args)
    log_q, log_p = by_particle(q), by_particle(p)
    weights = (log_p - log_q).detach().softmax(0)
    expected = torch.autograd.grad(-(weights * log_q).sum(), list(guide.parameters()))
    assert torch.allclose(gradient, parameters_to_vector(expected), rtol=1e-7, atol=1e-9), "wake"


def by_particle(trace):
    trace.compute_log_prob()
    sites = [
        s for s in trace.nodes.values() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"
    ]
    return sum(site["log_prob"].reshape(4, -1).sum(-1) for site in sites)


# --- in the place of an autoguide


def weights(guide):
    return parameters_to_vector(guide.parameters()).detach().clone()


def train(model, guide, *args, elbo=None, count=3):
    """Take some steps; returns the share of the parameters that moved."""
    guide.call(*args) if hasattr(guide, "call") else guide(*args)
    before = weights(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo or Trace_ELBO())
    for _ in range(count):
        svi.step(*args)
    return float((weights(guide) != before).double().mean())


def member(site):
    return AmortizedGuide(poutine.block(mixed, hide=list({"a", "z", "k"} - {site})), small_encoder())


def test_a_list_takes_it_as_a_member():
    guide = AutoGuideList(mixed)
    guide.append(AutoNormal(poutine.block(mixed, expose=["a"])))
    guide.append(member("z"))
    guide.append(AutoDiscreteParallel(poutine.block(mixed, expose=["k"])))
    assert train(mixed, guide, rows(), elbo=TraceEnum_ELBO(max_plate_nesting=1)) == 1.0
    trace = poutine.trace(guide).get_trace(rows())
    assert trace.nodes["z"]["value"].shape == (4, 2)
    assert {"a", "z", "k"} <= set(trace.nodes)


def test_members_of_a_list_add_their_densities():
    visible = poutine.block(mixed, hide=["k"])
    guide = AutoGuideList(visible)
    guide.append(AmortizedGuide(poutine.block(mixed, hide=["z", "k"]), amortize=()))
    guide.append(member("z"))
    trace = poutine.trace(guide).get_trace(rows())
    values = {name: trace.nodes[name]["value"] for name in "az"}
    parts = [part.log_prob({n: v}, rows()).sum() for part, (n, v) in zip(guide, values.items(), strict=True)]
    assert torch.allclose(trace.log_prob_sum(), sum(parts))
    assert set(guide.median(rows())) == {"a", "z"}
    assert set(guide.quantiles([0.1, 0.9], rows())) == {"a", "z"}


def test_a_blocked_site_is_left_to_the_model():
    guide = AmortizedGuide(poutine.block(hierarchy, hide=["s"]), small_encoder())
    assert {"center", "spread", "z"} == set(guide(rows()))
    with pytest.warns(UserWarning, match="vars in model but not guide: {'s'}"):
        assert train(hierarchy, guide, rows()) > 0.9


def test_it_nests_in_a_guide_of_the_users_own():
    inner = AmortizedGuide(poutine.block(hierarchy, hide=["center"]), small_encoder())
    guide = Outer(inner)
    guide(rows())
    assert train(hierarchy, guide, rows()) > 0.9
    assert sum(name.startswith("inner.") for name, _ in guide.named_parameters()) > 5


def test_plates_may_be_the_users_own():
    i, j = torch.tensor([5, 1]), torch.tensor([7, 0, 2, 4])

    def create_plates(x):
        return pyro.plate("a", 6, subsample=i, dim=-2), pyro.plate("b", 8, subsample=j, dim=-1)

    guide = AmortizedGuide(chosen, small_encoder(), create_plates=create_plates)
    trace = poutine.trace(guide).get_trace(rows(6, 8))
    assert torch.equal(trace.nodes["a"]["value"], i)
    model = poutine.trace(poutine.replay(chosen, trace=trace)).get_trace(rows(6, 8))
    assert torch.equal(model.nodes["x"]["value"], rows(6, 8)[i][:, j])


START = {"center": two(0.3, -0.2), "spread": two(1.7)[0]}


@by_family
def test_it_starts_where_it_is_told(family):
    options = {"family": family, "init_scale": 0.37, "init_loc_fn": init_to_value(values=START)}
    guide = AmortizedGuide(hierarchy, small_encoder(), **options)
    median = guide.median(rows())
    for name, value in START.items():
        assert torch.allclose(median[name], value, rtol=1e-12, atol=1e-12)
    draws = guide.posterior(rows(), num_draws=4000).draws
    for u in (draws["center"], draws["spread"].log(), draws["s"].log()):
        assert torch.allclose(u.std(0), two(0.37)[0], rtol=0.06)  # 5 standard errors; low rank: 1e-4 more


@by_family
@pytest.mark.parametrize("name", ["hierarchy", "nested", "Local positive", "dependent"])
def test_quantiles_are_monotone(name, family):
    model, args, _, _ = MODELS[name]
    guide = prepared(model, *args, family=family)
    quantiles = guide.quantiles([0.05, 0.25, 0.5, 0.75, 0.95], *args)
    for site, value in guide.posterior(*args, num_draws=2).draws.items():
        assert quantiles[site].shape == (5, *value.shape[1:])
        assert (quantiles[site].diff(dim=0) > 0.0).all()
        assert not quantiles[site].requires_grad


def test_call_returns_values_in_the_order_of_names():
    guide = prepared(hierarchy, rows())
    shapes = [tuple(value.shape) for value in guide.call(rows())]
    assert shapes == [(2,), (4,), (), (4, 2)]  # center, s, spread, z


def test_modules_with_sampled_weights():
    model = Regression()
    guide = AmortizedGuide(model, amortize=())
    assert train(model, guide, rows(), rows()[:, 0]) == 1.0
    median = guide.median(rows(), rows()[:, 0])
    assert median["linear.weight"].shape == (1, 2)
    draws = Predictive(model, guide=guide, num_samples=5, return_sites=["y", "linear.bias"])(rows())
    assert draws["y"].shape == (5, 4)


def test_reparameterized_models():
    model = poutine.reparam(hierarchy, config={"z": LocScaleReparam(0.0)})
    guide = AmortizedGuide(model, small_encoder())
    assert train(model, guide, rows()) > 0.9
    assert "z_decentered" in guide.median(rows())


def test_spheres_work_once_reparameterized():
    def model():
        pyro.sample("v", dist.ProjectedNormal(two(1.0, 0.0, 0.0)))

    with pytest.raises(ValueError, match="ProjectedNormalReparam"):
        AmortizedGuide(model)()
    model = poutine.reparam(model, config={"v": ProjectedNormalReparam()})
    assert train(model, AmortizedGuide(model)) == 1.0


def test_what_cannot_be_guided_is_told():
    def count():
        pyro.sample("k", dist.Poisson(3.0))

    with pytest.raises(ValueError, match=r"truncate a count"):
        AmortizedGuide(count)()
    with pytest.raises(RuntimeError, match="no latent variables"):
        AmortizedGuide(lambda: None)()


# --- several guides, copies, and other ways to train


def test_two_guides_in_one_process_both_train():
    for _ in range(2):
        assert train(normal_rows, AmortizedGuide(normal_rows, small_encoder()), rows()) > 0.9


def test_control_two_guides_of_one_name_are_refused():
    first = AmortizedGuide(normal_rows, small_encoder(), name="one")
    second = AmortizedGuide(normal_rows, small_encoder(), name="one")
    assert train(normal_rows, first, rows()) > 0.9
    with pytest.raises(RuntimeError, match="another tensor under 'one"):
        train(normal_rows, second, rows())


def saved_and_loaded(guide):
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_loaded_guide_takes_a_module_as_its_model():
    model = Regression()
    args = rows(), rows()[:, 0]
    guide = saved_and_loaded(AmortizedGuide(model, amortize=()).setup(*args))
    guide.model = model
    assert guide.model is model
    assert train(model, guide, *args) == 1.0


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_train_and_leave_the_original_alone(copied, trained):
    guide = prepared(hierarchy, rows())
    if trained:
        train(hierarchy, guide, rows())
    before = weights(guide)
    clone = copied(guide)
    clone.model = hierarchy
    assert torch.equal(weights(clone), before)
    assert train(hierarchy, clone, rows()) > 0.9
    assert torch.equal(weights(guide), before)
    assert guide.model is hierarchy
    assert train(hierarchy, guide, rows()) > 0.9


def test_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = AmortizedGuide(hierarchy, small_encoder())
        assert train(hierarchy, guide, rows()) > 0.9
        with_torch(hierarchy, AmortizedGuide(hierarchy, small_encoder()))
        assert not list(pyro.get_param_store().keys())


def with_torch(model, guide):
    module = Trace_ELBO()(model, guide.setup(rows()))
    before = weights(guide)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(rows()).backward()
        optimizer.step()
    assert (weights(guide) != before).double().mean() > 0.9


@pytest.mark.parametrize("model", [normal_rows, hierarchy])
def test_torch_optimizers_train_it(model):
    with_torch(model, AmortizedGuide(model, small_encoder()))
