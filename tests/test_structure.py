"""What a guide learns by running a model unseen: sites, plates, what may change, who depends on whom."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from scipy import stats
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_guides import AmortizedGuide
from pyro_guides.structure import dependencies, live_sites, random_subset, read, signature, upstream

N = 6
X = torch.randn(N, generator=torch.Generator().manual_seed(1))


def normal(name, loc=0.0, **options):
    return pyro.sample(name, dist.Normal(loc, 1.0), **options)


def rows(x=X, **options):
    """One latent and one observation per row."""
    with pyro.plate("data", len(x), **options):
        normal("x", normal("z"), obs=x)


def everything(x, *, y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    chol = pyro.sample("chol", dist.LKJCholesky(3, 1.0))
    with pyro.plate("outer", 4, dim=-3), pyro.plate("inner", 20, subsample_size=5, dim=-1):
        pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)
    with pyro.plate("other", 2, subsample=torch.tensor([1])):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=chol), obs=y)


def test_read_describes_latents_plates_and_observations():
    x, y = torch.zeros(5), torch.zeros(3)
    found = read(everything, (x,), {"y": y})
    assert list(found.latents) == ["scale", "chol", "w"]
    w, chol = found.latents["w"], found.latents["chol"]
    assert (w.plates, tuple(w.event_shape), tuple(w.unconstrained_shape)) == (("outer", "inner"), (3,), (2,))
    assert w.support is constraints.simplex
    assert (chol.plates, tuple(chol.event_shape), chol.size) == ((), (3, 3), 3)
    assert w.scale == 1.0  # the subsampled plate's own scale is left out
    plates = {n: (p.dim, p.size, p.batch, p.chosen, p.subsampled, p.scale) for n, p in found.plates.items()}
    assert plates == {
        "outer": (-3, 4, 4, False, False, 1.0),
        "inner": (-1, 20, 5, False, True, 4.0),
        "other": (-1, 2, 1, True, True, 2.0),
    }
    assert found.plates["other"].indices.tolist() == [1]
    assert len(set(found.plates["inner"].indices.tolist())) == 5
    observed = [(o.name, o.plates, o.argument) for o in found.observed.values()]
    assert observed == [("x", ("outer", "inner"), 0), ("y", ("other",), "y")]
    assert found.depth == 3
    assert found.batch_shape(w.plates) == (4, 1, 5)
    assert found.batch_shape(w.plates, full=True) == (4, 1, 20)
    assert found.with_full_plates({"inner"}).batch_shape(w.plates) == (4, 1, 20)
    assert found.values["w"].shape == (4, 1, 5, 3)
    assert found.without_values().values == {}


def test_read_takes_values_and_elements_it_is_given():
    given, indices = {"z": torch.arange(2.0)}, {"data": torch.tensor([4, 1])}

    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            seen.append((index.tolist(), normal("z").tolist()))

    seen = []
    read(model, (X,), {}, given=given, indices=indices)
    assert seen == [([4, 1], [0.0, 1.0])]


MASK = torch.tensor([True] * 3 + [False] * 3)
INNER = dist.Normal(torch.zeros(N, 2), 1.0).mask(MASK[:, None]).to_event(1)


@pytest.mark.parametrize(
    ("outer", "fn", "found"),
    [
        (MASK, dist.Normal(0.0, 1.0), (MASK, None, 0)),
        (True, dist.Normal(0.0, 1.0).mask(MASK), (MASK, None, 0)),
        (True, INNER, (None, MASK[:, None].expand(N, 2), 1)),
        (MASK, INNER, (MASK, MASK[:, None].expand(N, 2), 1)),
    ],
)
def test_masks_are_found_where_they_are(outer, fn, found):
    def model():
        with pyro.plate("data", N), poutine.mask(mask=outer):
            pyro.sample("z", fn)

    latent = read(model, (), {}).latents["z"]
    for mask, expected in zip((latent.mask, latent.inner_mask), found[:2], strict=True):
        assert mask is expected or torch.equal(mask, expected)
    assert latent.inner_mask_dim == found[2]
    assert not latent.fixed


def test_read_leaves_no_trace_in_outer_handlers():
    with pyro.plate("around", 2, dim=-2), poutine.trace() as tracer:
        before = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
        read(rows, (), {})
        assert (list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)) == before
    assert list(tracer.trace.nodes) == []


def raising(where):
    with pyro.plate("data", N), poutine.scale(scale=2.0):
        normal("z")
        for i in pyro.plate("sequential", 3):
            normal(f"y_{i}", obs=X)
            if where == "sequential":
                raise ArithmeticError(where)
    if where == "end":
        raise ArithmeticError(where)


@pytest.mark.parametrize("where", ["end", "sequential"])
@pytest.mark.parametrize("until", [None, ["z", "never"]])
def test_read_cleans_up_when_the_model_raises(where, until):
    with pytest.raises(ArithmeticError, match=where) as caught:
        read(raising, (where,), {}, until=until)
    assert (list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)) == ([], [])
    del caught
    assert list(_PYRO_STACK) == []  # generators of sequential plates have closed by now, too
    assert list(read(raising, ("nowhere",), {}).latents) == ["z"]


def test_read_consumes_no_random_number():
    def model():
        pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("b", dist.Dirichlet(torch.ones(3)))
        pyro.sample("c", dist.LKJCholesky(4, 1.0))
        pyro.sample("d", dist.Uniform(torch.tensor(1.0), 2.0))

    before = torch.get_rng_state()
    read(model, (), {}, until=["a", "d"])
    read(model, (), {})
    assert torch.equal(torch.get_rng_state(), before)
    model()
    assert not torch.equal(torch.get_rng_state(), before)  # control


def test_signatures_differ_where_structures_may():
    model, x = torch.nn.Identity(), torch.zeros(3, 2)

    def key(*changes):
        call = {0: x, 1: 2, 2: "a", 3: [x], "k": None} | dict(changes)
        return signature(model, tuple(call.pop(i) for i in range(4)), call)

    changes = [(0, x[:2]), (0, x.double()), (1, 3), (1, 2.0), (2, "b"), (3, [x, x]), (3, (x,)), ("k", 1)]
    changes += [("k", True), ("k", 1.0), ("k", {"deep": 1}), ("k", "None"), ("j", None)]
    keys = [key(), *map(key, changes)]
    assert key((0, torch.ones(3, 2))) == keys[0]
    assert signature(model.forward, (x, 2, "a", [x]), {"k": None}) == keys[0]  # its module's mode
    with pyro.plate("around", 5, dim=-2):
        keys.append(key())
    model.eval()
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert {key((1, unknown)) for unknown in (object(), X.numpy(), {1, 2}, [len])} == {None}


DYNAMIC = {
    "explicit indices": lambda: rows(subsample=torch.arange(N)),
    "a mask": lambda: poutine.mask(rows, mask=MASK)(),
    "a scale": lambda: poutine.scale(rows, scale=torch.tensor(2.0))(),
    "a plain scale": lambda: poutine.scale(rows, scale=2.0)(),
    "a support with tensors": lambda: pyro.sample("z", dist.Uniform(0.0, torch.tensor(2.0))),
    "a decision": lambda: rows() if X.sum() > 0 else rows(X + 1),
}
STATIC = {
    "rows": rows,
    "subsample": lambda: rows(subsample_size=3),
    "mask on observations": lambda: [normal("z"), poutine.mask(normal, mask=MASK[0])("x", obs=X[0])],
    "fixed support": lambda: pyro.sample("z", dist.HalfNormal(torch.ones(3)).to_event(1)),
    "parameters": lambda: pyro.sample("z", dist.Gamma(X.exp(), 1.0).to_event(1)),
}
# Expressions in a vector x, a number n and a mask m that read values, or let them decide a shape.
READS_VALUES = """
bool(x.sum() > 0) | x.sum().item() | float(x[0]) | int(x[0]) | x.tolist() | x.numpy() | x[0].is_nonzero()
3.0 in x | torch.equal(x, x) | torch.allclose(x, x) | f"{x[0]}" | max(x) | range(n) | [1, 2, 3][n] | x[:n]
torch.arange(n) | torch.zeros(n) | x[:1].expand(n) | x.split(n) | x.repeat_interleave(m.long()) | x[m]
x[:, None][m, 0] | x.masked_select(m) | m.nonzero() | torch.where(m) | x.unique() | m.long().bincount()
"""
READS_SHAPES = """
len(x) > 2 and x.dim() == 1 | x[torch.arange(6)] | x[None][:, torch.tensor([2, 0])] | list(x) | x[-1, None]
torch.where(m, x, 0.0) | x.clamp(max=x.max()) | x.masked_fill(m, 1.0) | x.isfinite().all() | x.topk(2)
"""


def using(expression):
    names = {"torch": torch, "x": X, "n": torch.tensor(2), "m": MASK}
    return lambda: [eval(expression, names), rows()]  # noqa: S307


def expressions(text):
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|")]


DYNAMIC |= {text: using(text) for text in expressions(READS_VALUES)}
STATIC |= {text: using(text) for text in expressions(READS_SHAPES)}


@pytest.mark.parametrize("name", DYNAMIC)
def test_values_that_reach_python_make_a_model_dynamic(name):
    assert not read(DYNAMIC[name], (), {}).static


@pytest.mark.parametrize("name", STATIC)
def test_what_cannot_change_is_static(name):
    assert read(STATIC[name], (), {}).static
    for part in ({"until": ["z"]}, {"given": {"z": torch.zeros(())}}):  # not all of it was seen
        assert not read(STATIC[name], (), {}, **part).static


class Counted:
    """A model that counts its runs and how many of them reach its end."""

    def __init__(self, body):
        self.body, self.runs, self.ends = body, 0, 0

    def __call__(self, *args, **kwargs):
        self.runs += 1
        self.body(*args, **kwargs)
        self.ends += 1


def test_static_model_runs_once_per_signature():
    model = Counted(lambda x, flag=1: rows(x))
    guide = AmortizedGuide(model)
    # The first reading is followed by a second run that asks for dependencies.
    for x, flag, runs in [(X, 1, 2), (X + 1, 1, 2), (X[:3], 1, 3), (X, 2, 4), (X[:3], 1, 4), (X, 1, 4)]:
        guide(x, flag)
        assert model.runs == runs == model.ends
    with pyro.plate("particles", 3, dim=-2):
        guide(X)
        guide(X)
    assert model.runs == 5  # the plate around makes a signature of its own


@pytest.mark.parametrize("name", ["explicit indices", "a mask", "a decision", "a support with tensors"])
def test_dynamic_model_runs_every_time_up_to_its_last_latent(name):
    guide = AmortizedGuide(Counted(DYNAMIC[name]))
    guide()
    runs, before = guide.model.runs, torch.get_rng_state()
    guide._structure((), {}, complete=False)
    assert torch.equal(torch.get_rng_state(), before)
    guide()
    assert guide.model.runs == runs + 2
    assert guide.model.ends == 2  # only the runs of the setup went on to the observations


def test_arguments_that_cannot_be_compared_are_read_again():
    model = Counted(lambda config: rows(config[0]))
    guide = AmortizedGuide(model, amortize=())
    config = np.array([None])  # of a kind that no signature knows
    config[0] = X
    guide(config)
    runs = model.runs
    guide(config)
    assert model.runs == runs + 1
    config[0] = X[:4]
    with pytest.raises(ValueError, match=r"set up with shape \(6,\), this call has \(4,\)"):
        guide(config)


def test_number_of_observations_may_change():
    def series(x, steps):
        level = normal("level")
        for t in range(steps):
            normal(f"x_{t}", level, obs=x[t])

    model = Counted(series)
    guide = AmortizedGuide(model)
    for steps in (3, 5, 3, 5):
        guide(X, steps)
    assert model.runs == 3  # one of them asks for dependencies
    guide = AmortizedGuide(lambda x, n: rows(x[:n]), inputs=lambda x, n: x[:n])
    assert [len(guide(X, torch.tensor(n))["z"]) for n in (3, 5, 2)] == [3, 5, 2]  # n by its value


@pytest.mark.parametrize(("size", "count"), [(5, 3), (8, 2), (40, 4)])
def test_random_subset_is_uniform(size, count):
    draws = torch.stack([random_subset(size, count) for _ in range(4000)])
    assert draws.shape == (4000, count)
    assert (draws.sort(1).values.diff() > 0).all()

    def p_value(values, cells):
        counts = values.bincount(minlength=size**2)[cells]
        assert counts.sum() == len(values)
        return stats.chisquare(counts.numpy()).pvalue

    every, pairs = torch.arange(size), ~torch.eye(size, dtype=torch.bool).flatten()
    assert min(p_value(column, every) for column in draws.T) > 1e-4
    assert p_value(draws[:, 0] * size + draws[:, 1], pairs) > 1e-4
    assert p_value(draws.sort(1).values[:, 0], every) < 1e-4  # control: sorted is not uniform


def test_random_subset_of_everything_and_after_many_repeats():
    assert sorted(random_subset(7, 7).tolist()) == list(range(7))
    times = torch.zeros(1600)
    for _ in range(100):
        subset = random_subset(1600, 400)
        assert len(subset.unique()) == 400
        assert subset.untyped_storage().nbytes() == 8 * 400  # keeps nothing else alive
        times[subset] += 1
    assert (times.mean(), times.min() > 5, times.max() < 50) == (25.0, True, True)


class Elements(TorchDispatchMode):
    """Counts the elements that tensor operations produce."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += getattr(result, "numel", int)()
        return result


def test_random_subset_costs_the_same_for_any_size():
    def cost(make):
        with Elements() as elements:
            make()
        return elements.count

    small, large = (cost(lambda n=n: random_subset(n, 100)) for n in (100_000, 10**12))
    assert large <= small < 5000
    assert cost(lambda: torch.randperm(100_000)) >= 100_000  # control


def chain():
    normal("x", normal("c", normal("b", normal("a"))), obs=X[0])


def collider():
    a, b, _ = normal("a"), normal("b"), normal("c")
    normal("x", a * b, obs=X[0])


def side_by_side():
    a = normal("a")
    for plate, name, size in (("left", "b", 2), ("right", "c", 3)):
        with pyro.plate(plate, size):
            normal(f"x_{plate}", normal(name, a), obs=X[:size])


GRAPHS = {  # model -> neighbours, and earlier groups that a, b, c depend on
    chain: ({"a": {"b"}, "b": {"a", "c"}, "c": {"b"}}, [set(), {0}, {1}]),
    collider: ({"a": {"b"}, "b": {"a"}, "c": set()}, [set(), {0}, set()]),
    side_by_side: ({"a": {"b", "c"}, "b": {"a"}, "c": {"a"}}, [set(), {0}, {0}]),
}


@pytest.mark.parametrize("model", GRAPHS, ids=lambda model: model.__name__)
def test_neighbours_and_upstream(model):
    graph, links = GRAPHS[model]
    found = dependencies(model, (), {}).neighbours
    assert found == graph
    assert upstream([["a"], ["b"], ["c"]], found) == links
    assert _PYRO_STACK == []


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([["c"], ["a"], ["b"]], [set(), {0}, {0, 1}]),  # through b, which is drawn later
        ([["a", "c"], ["b"]], [set(), {0}]),
        ([["a"], ["b", "c"]], [set(), {0}]),
        ([["b"], ["a"], ["c"]], [set(), {0}, {0}]),
    ],
)
def test_upstream_in_other_orders(groups, expected):
    assert upstream(groups, GRAPHS[chain][0]) == expected


def test_live_sites():
    def model():
        low = normal("low")
        pyro.sample("support", dist.Uniform(low, low + 1.0))
        normal("parameter", low)
        pyro.sample("constant", dist.Uniform(torch.tensor(0.0), 1.0))
        with poutine.mask(mask=low > 0):
            normal("mask")
        with poutine.scale(scale=low.exp()):
            normal("scale")

    assert live_sites(model, (), {}) == {"support", "mask", "scale"}


def test_a_scale_that_a_closure_changes_is_followed_even_from_one():
    warmup = {"scale": 1.0}

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=warmup["scale"]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AmortizedGuide(model), torch.randn(4)
    for scale in (1.0, 0.25, 1.0):
        warmup["scale"] = scale
        assert pyro.poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == scale


@pytest.mark.parametrize("name", ["Cauchy", "HalfCauchy", "Exponential", "Laplace", "Pareto", "Weibull"])
def test_priors_whose_samplers_cannot_be_tracked(name):
    """Torch draws these by asking a parameter for a new tensor; of a tracked one it has a wrong shape."""

    def prior(loc):
        family = getattr(dist, name)
        return family(loc) if name in ("HalfCauchy", "Exponential") else family(loc, torch.tensor(2.0))

    def model(x):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        scale = pyro.sample("scale", prior(top))
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            z = pyro.sample("z", prior(scale.abs() + 0.1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    graph = dependencies(model, (torch.randn(3, 4),), {})
    assert graph.children == {"top": {"scale"}, "scale": {"z"}, "z": {"x"}}
    assert live_sites(model, (torch.randn(3, 4),), {}) == ({"scale", "z"} if name == "Pareto" else set())
