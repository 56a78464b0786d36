"""The fused optimizer against Pyro's own, step by step."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_guides import AmortizedGuide, optim
from pyro_guides.optim import FusedOptim

F64 = torch.float64
X = torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=F64) * 2.0 + 1.0


def model(x, step):
    """Parameters of its own, one of them constrained, and more of them as time goes by."""
    scale = pyro.param("scale", torch.tensor(1.5, dtype=F64), constraint=constraints.positive)
    shift = 0.0
    for i in range(min(step // 4, 3)):
        shift = shift + pyro.param(f"shift.{i}", torch.tensor(0.1 * i, dtype=F64))
    if step == 9:  # used in one step only
        shift = shift + pyro.param("once", torch.tensor(0.3, dtype=F64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z + shift, scale), obs=x)


def run(optimizer, steps=range(25), guide=None, seed=5):
    """Losses and parameters of a training run."""
    if guide is None:
        pyro.clear_param_store()
        guide = AmortizedGuide(model, amortize=(), name="guide")
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    losses = []
    for step in steps:
        pyro.set_rng_seed(seed + step)
        losses.append(svi.step(X, step))
    return torch.tensor(losses), snapshot(), guide


def snapshot():
    store = pyro.get_param_store()
    return {name: store[name].detach().clone() for name in store}


def same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=tolerance, atol=tolerance)


def by_name(name):
    return {
        "lr": 0.05 if "shift" in name else 0.01,
        "betas": (0.8, 0.99) if name == "scale" else (0.9, 0.999),
    }


def clip_by_name(module, name):
    return {"clip_norm": 0.5} if module == "guide" else {}


ARGUMENTS = {
    "dict": ({"lr": 0.02},),
    "more options": ({"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True},),
    "by name": (by_name,),
    "by two names": (lambda module, name: {"lr": 0.03 if module == "guide" else 0.01},),
    "clip norm": ({"lr": 0.02}, {"clip_norm": 0.3}),
    "clip value": ({"lr": 0.02}, {"clip_value": 0.1}),
    "clip both": ({"lr": 0.02}, {"clip_norm": 1.0, "clip_value": 0.2}),
    "clip by name": (by_name, clip_by_name),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_adam_equals_pyro_step_by_step(name):
    ours = run(optim.Adam(*ARGUMENTS[name]))
    theirs = run(pyro.optim.Adam(*ARGUMENTS[name]))
    assert {"scale", "shift.2", "once", "guide$$$heads.0.bias"} <= ours[1].keys()
    same(ours, theirs)
    with pytest.raises(AssertionError):  # control: another rate is another run
        same(ours, run(pyro.optim.Adam({"lr": 0.021})))


@pytest.mark.parametrize(
    ("constructor", "options"),
    [
        (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.02}),
        (torch.optim.Adagrad, {"lr": 0.02}),
        (torch.optim.RMSprop, {"lr": 0.01}),  # has no fused version
        (torch.optim.Adam, {"lr": 0.02, "fused": False}),
        (torch.optim.Adam, {"lr": 0.02, "foreach": True}),
        (torch.optim.Adam, {"lr": 0.02, "foreach": False}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_any_torch_optimizer(constructor, options):
    same(run(FusedOptim(constructor, options)), run(pyro.optim.PyroOptim(constructor, options)))


def test_one_torch_optimizer_for_all_parameters():
    stepped = []

    class Counting(torch.optim.Adam):
        def __init__(self, params, lr=1e-3, fused=None):
            super().__init__(params, lr=lr, fused=fused)

        def step(self, closure=None):
            stepped.append(self)
            return super().step(closure)

    optimizer = FusedOptim(Counting, {"lr": 0.02})
    _, parameters, _ = run(optimizer)
    assert stepped == [optimizer.optimizer] * 25  # one step of one optimizer for all
    (group,) = optimizer.optimizer.param_groups
    assert len(group["params"]) == len(parameters) == 6
    assert group["fused"] is True
    optimizer = FusedOptim(Counting, lambda name: {"lr": 0.02 if "shift" in name else 0.01})
    run(optimizer)
    assert [len(group["params"]) for group in optimizer.optimizer.param_groups] == [3, 3]
    assert stepped[25:] == [optimizer.optimizer] * 25


class Recorded(optim.Adam):
    """Notes which parameters every step moved."""

    def __call__(self, params, *args, **kwargs):
        before = snapshot()
        super().__call__(params, *args, **kwargs)
        self.moved = {name for name, value in snapshot().items() if not torch.equal(value, before[name])}


def test_parameters_that_a_step_does_not_use_stay():
    optimizer = Recorded({"lr": 0.1})
    _, _, guide = run(optimizer, range(10))
    assert "once" in optimizer.moved
    everything = set(snapshot())
    run(optimizer, range(10, 14), guide)
    assert optimizer.moved == everything - {"once"} | {"shift.2"}
    assert optimizer.optimizer.state[pyro.get_param_store()._params["once"]]["step"] == 1


def test_two_guides_train_under_names_of_their_own():
    optimizer, guides = optim.Adam({"lr": 0.1}), [AmortizedGuide(model, amortize=()) for _ in range(2)]
    for guide in guides:
        _, before, _ = run(optimizer, range(1), guide)
        run(optimizer, range(1, 3), guide)
        moved = {
            name for name, value in snapshot().items() if not torch.equal(value, before.get(name, value))
        }
        assert {f"{guide._store_name}$$${name}" for name, _ in guide.network.named_parameters()} < moved
    assert guides[0]._store_name != guides[1]._store_name


def test_gradients_of_unused_parameters_survive():
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = FusedOptim(torch.optim.SGD, {"lr": 0.5})
    for parameters in ([used, unused], [used]):
        used.grad, unused.grad = torch.ones(2), torch.full((2,), 2.0)
        optimizer(parameters)
    assert used.tolist() == [0.0, 0.0]
    assert unused.tolist() == [0.0, 0.0]  # moved once, by twice the gradient
    assert unused.grad.tolist() == [2.0, 2.0]
    optimizer([])
    assert used.tolist() == [0.0, 0.0]


def resumed(optimizer, params):
    """Restore a parameter store, as a new process would, and train on."""
    pyro.clear_param_store()
    pyro.get_param_store().set_state(copy.deepcopy(params))
    guide = AmortizedGuide(model, amortize=(), name="guide")
    pyro.set_rng_seed(0)
    guide.setup(X, 10)
    with torch.no_grad():
        for name, parameter in guide.network.named_parameters():
            parameter.copy_(pyro.get_param_store()[f"guide$$${name}"])
            pyro.get_param_store().__delitem__(f"guide$$${name}")
    return run(optimizer, range(10, 25), guide)


@pytest.mark.parametrize(
    "args", [({"lr": 0.02, "amsgrad": True},), (by_name, clip_by_name)], ids=["dict", "name"]
)
@pytest.mark.parametrize("through", ["memory", "file"])
def test_training_resumes_where_it_stopped(args, through, tmp_path):
    optimizer = optim.Adam(*args)
    _, _, guide = run(optimizer, range(10))
    params = copy.deepcopy(pyro.get_param_store().get_state())
    state = copy.deepcopy(optimizer.get_state())
    optimizer.save(tmp_path / "optimizer.pt")
    expected = run(optimizer, range(10, 25), guide)

    fresh = optim.Adam(*args)
    if through == "file":
        fresh.load(tmp_path / "optimizer.pt")
    else:
        fresh.set_state(copy.deepcopy(state))
    same(resumed(fresh, params), expected, tolerance=0.0)
    with pytest.raises(AssertionError):  # control: without the state
        same(resumed(optim.Adam(*args), params), expected)


def test_state_is_by_parameter_name():
    optimizer = optim.Adam(by_name)
    assert optimizer.get_state() == {}
    _, parameters, _ = run(optimizer)
    state = optimizer.get_state()
    assert state.keys() == parameters.keys()
    assert state["scale"]["state"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (state["scale"]["options"]["lr"], state["shift.0"]["options"]["lr"]) == (0.01, 0.05)
    assert "params" not in state["scale"]["options"]


def test_state_returns_to_known_parameters_one_by_one():
    """Options that belong to one parameter must not spread to those of its group."""
    names = ("a", "b")

    def step(optimizer):
        store = pyro.get_param_store()
        for name in names:
            store._params[name].grad = torch.tensor([1.0])
        optimizer([store._params[name] for name in names])
        return [store[name].item() for name in names]

    def fresh():
        pyro.clear_param_store()
        for name in names:
            pyro.param(name, torch.zeros(1))

    fresh()
    saved = optim.Adam(lambda name: {"lr": 0.1 if name == "a" else 0.01})
    first = step(saved)
    torch.testing.assert_close(first, [-0.1, -0.01])
    state = copy.deepcopy(saved.get_state())
    expected = step(saved)
    fresh()
    other = optim.Adam({"lr": 0.5})
    step(other)
    other.set_state(state)
    with torch.no_grad():
        for name, value in zip(names, first, strict=True):
            pyro.get_param_store()._params[name].fill_(value)
    torch.testing.assert_close(step(other), expected)


def test_state_is_a_snapshot():
    optimizer = optim.Adam({"lr": 0.1})
    parameter = pyro.param("a", torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer([parameter])
    state = optimizer.get_state()
    before = copy.deepcopy(state)
    optimizer([parameter])
    assert torch.equal(state["a"]["state"]["exp_avg"], before["a"]["state"]["exp_avg"])
    optimizer.set_state(state)
    assert optimizer.get_state()["a"]["state"]["step"] == 1


@pytest.mark.parametrize("constructor", [optim.Adam, lambda *a: FusedOptim(torch.optim.SGD, *a)])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0.01,), "optim_args must be a dict or a function that returns one, got 0.01"),
        (([("lr", 0.01)],), "optim_args must be a dict or a function"),
        ((None,), "optim_args must be a dict or a function"),
        (({"lr": 0.01}, 10.0), "clip_args must be a dict or a function that returns one, got 10.0"),
    ],
)
def test_bad_arguments(constructor, args, message):
    with pytest.raises(TypeError, match=message):
        constructor(*args)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"lr": -1.0}, ValueError), ({"speed": 1.0}, TypeError), (lambda name: 0.1, AssertionError)],
)
def test_bad_options_are_torchs_own_errors(options, error):
    parameter = pyro.param("a", torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = optim.Adam(options)
    for _ in range(2):  # and nothing is half taken in
        with pytest.raises(error):
            optimizer([parameter])
    assert parameter.item() == 0.0
    assert optimizer.optimizer is None
