"""Families, bounds, priors and models that several test files share; everything is float64."""

from functools import partial
from types import MappingProxyType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints as c
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
)
from pyro_guides.distributions import bijection

F64 = {"dtype": torch.float64}
FAMILIES = {"diagonal": DiagonalNormal(), "full_rank": FullRankNormal(), "low_rank": LowRankNormal(2)}
EVERY_FAMILY = FAMILIES | {
    "mixture": NormalMixture(3),
    "flow": NormalizingFlow(2, hidden=(8,), context_size=4),
}
ELBOS = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, strict_enumeration_warning=False),
    "Renyi": RenyiELBO,
}
PARTICLES = {
    "looped": {"num_particles": 2, "vectorize_particles": False},
    "vectorized": {"num_particles": 5, "vectorize_particles": True},
}


# For `pytest.mark.parametrize`; the loss of these bounds is minus the mean of the log weights.
SUMS = [name for name in ELBOS if name not in ("Renyi", "TraceMeanField")]  # minus the mean of log weights
by_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
by_every_family = pytest.mark.parametrize("family", EVERY_FAMILY.values(), ids=EVERY_FAMILY)
by_particles = pytest.mark.parametrize("particles", PARTICLES)
by_elbo = pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
by_sum = pytest.mark.parametrize("elbo", [ELBOS[name] for name in SUMS], ids=SUMS)


def small_encoder():
    return MLP(width=8, depth=1)


def prepared(model, *args, family=None, spread=0.2, **options):
    """A guide whose q is neither where it started nor the same for every row."""
    options.setdefault("encoder", None if options.get("amortize") == () else small_encoder())
    guide = AmortizedGuide(model, family=family, **options).setup(*args)
    with torch.no_grad():
        for parameter in guide.network.parameters():
            parameter += spread * torch.randn_like(parameter)
    return guide


# --- priors on every support


class Pushed(dist.TransformedDistribution):
    """A normal pushed onto ``support``; torch itself would only know the last transform's codomain."""

    arg_constraints = MappingProxyType({})

    def __init__(self, support, loc, scale, validate_args=None):
        self.loc, self.scale, self._support = loc, scale, support
        transform = bijection(support)
        dims = transform.domain.event_dim
        normal = dist.Normal(loc, scale, validate_args=False).to_event(dims)
        super().__init__(normal, [transform], validate_args=False)

    @c.dependent_property
    def support(self):
        return self._support

    def log_prob(self, value):
        u, [transform] = self.transforms[0].inv(value), self.transforms
        jacobian = transform.log_abs_det_jacobian(u, value)  # torch leaves that of a stack unsummed
        jacobian = jacobian.reshape(*value.shape[: value.dim() - self.event_dim], -1).sum(-1)
        return self.base_dist.log_prob(u) - jacobian

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape) + self.loc.shape[self.loc.dim() - self.base_dist.event_dim :]
        return Pushed(self._support, self.loc.expand(shape), self.scale.expand(shape))


def pushed(support, size):
    """A prior on ``support`` from ``size`` unconstrained normal values (None: a scalar)."""
    values = torch.linspace(-0.5, 0.7, 1 if size is None else size, **F64)
    values = values.reshape(()) if size is None else values
    return Pushed(support, values, torch.full_like(values, 0.8))


def independent(support):
    return c.independent(support, 1)


# Each support's constraint, and how many unconstrained values it is made from (None: a scalar).
SUPPORTS = {
    "real": (c.real, None),
    "real_vector": (c.real_vector, 3),
    "positive": (c.positive, None),
    "positives": (independent(c.positive), 3),
    "nonnegative": (c.nonnegative, None),
    "greater_than": (c.greater_than(-1.5), None),
    "greater_than_eq": (c.greater_than_eq(2.0), None),
    "less_than": (c.less_than(3.0), None),
    "unit_interval": (c.unit_interval, None),
    "interval": (independent(c.interval(-1.0, 2.0)), 2),
    "half_open_interval": (c.half_open_interval(0.0, 5.0), None),
    "simplex": (c.simplex, 3),
    "corr_cholesky": (c.corr_cholesky, 3),
    "corr_matrix": (c.corr_matrix, 3),
    "ordered_vector": (c.ordered_vector, 3),
    "positive_ordered_vector": (c.positive_ordered_vector, 3),
    "softplus_positive": (c.softplus_positive, None),
    "cat": (independent(c.cat([c.positive, c.real], dim=-1, lengths=[2, 1])), 3),
    "stack": (c.stack([c.positive, c.real, c.unit_interval], dim=-1), 3),
    "lower_cholesky": (c.lower_cholesky, 6),
    "softplus_lower_cholesky": (c.softplus_lower_cholesky, 6),
    "unit_lower_cholesky": (c.unit_lower_cholesky, 3),
    "positive_definite": (c.positive_definite, 3),
}


def two(*values):
    return torch.tensor(values, **F64)


# Priors with densities of their own, which know nothing of bijections.
PRIORS = {
    "real_vector": lambda: dist.Normal(two(0.5, -1.0), two(1.0, 2.0)).to_event(1),
    "positive": lambda: dist.Gamma(two(2.0, 1.5), two(1.0, 3.0)).to_event(1),
    "unit_interval": lambda: dist.Beta(two(2.0)[0], two(3.0)[0]),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], **F64)),
    "ordered_vector": lambda: pushed(c.ordered_vector, 3),
    "lower_cholesky": lambda: pushed(c.lower_cholesky, 3),
    "corr_cholesky": lambda: dist.LKJCholesky(3, two(1.5)[0]),
    "positive_definite": lambda: dist.Wishart(two(4.0)[0], torch.eye(2, **F64)),
    "interval": lambda: dist.Uniform(two(-1.0, 0.0), two(2.0, 0.5)).to_event(1),
}


class Local:
    """x ~ N(A z, 0.7) for each row, z from a prior of any support.

    The plate has ``size`` elements, and the model is given the rows of a batch.
    """

    def __init__(self, prior, size=None):
        self.prior, self.size = prior, size
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(prior.event_shape.numel(), 2, generator=generator, **F64)

    def __call__(self, x):
        with pyro.plate("data", self.size or len(x), subsample_size=len(x)):
            z = pyro.sample("z", self.prior)
            mean = z.reshape(*z.shape[: z.dim() - self.prior.event_dim], -1) @ self.weight
            pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)


# --- models of many shapes; all float64


def normal_rows(x):
    """Conjugate: z ~ N(0, I), x ~ N(z, 0.5), in two dimensions."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def hierarchy(x):
    """Globals above two local sites, one of them constrained, that depend on them."""
    center = pyro.sample("center", dist.Normal(two(0.0, 0.0), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(two(0.0)[0], 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(center, spread.unsqueeze(-1)).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, spread + 0.1))
        pyro.sample("x", dist.Normal(z, s.unsqueeze(-1) + 0.1).to_event(1), obs=x)


def subsampled_hierarchy(x):
    """As `hierarchy`, the rows being a quarter of all rows."""
    center = pyro.sample("center", dist.Normal(two(0.0, 0.0), 2.0).to_event(1))
    with pyro.plate("data", 4 * len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(center, 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(two(2.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, s.unsqueeze(-1) + 0.1).to_event(1), obs=x)


def dependent(x):
    """A local support that ends at a global value."""
    top = pyro.sample("top", dist.LogNormal(two(0.0)[0], 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(-top, top))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=x)


def dependent_rows(x):
    """A support that ends at another value of the same row."""
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.LogNormal(two(0.0)[0], 0.5))
        z = pyro.sample("z", dist.Uniform(-top, top))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=x)


def crossed(x):
    """A row effect, a column effect, and a cell effect that depends on both; x is (rows, columns)."""
    rows = pyro.plate("rows", x.shape[0], dim=-2)
    columns = pyro.plate("columns", x.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(two(0.0)[0], 1.0))
    with columns:
        b = pyro.sample("b", dist.Gamma(two(2.0)[0], 1.0))
    with rows, columns:
        z = pyro.sample("z", dist.Normal(a, b + 0.1))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def around(noise):
    """Rows around a mean that they share, seen with some noise: all is normal."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), **F64), 10.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    return model


def nested(x):
    """Plates inside plates, each with a latent."""
    with pyro.plate("rows", x.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(two(0.0)[0], 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3, **F64)))
            pyro.sample("x", dist.Normal(a + p[..., 0] - p[..., 1], 0.5), obs=x)


def side_by_side(x, y):
    """Two plates on the same dimension, one after the other."""
    with pyro.plate("first", len(x)):
        a = pyro.sample("a", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(a, 0.5).to_event(1), obs=x)
    with pyro.plate("second", len(y)):
        b = pyro.sample("b", dist.Gamma(two(2.0, 1.0), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(b, 0.5).to_event(1), obs=y)


def left_plate(x):
    """The only plate at dim -2."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x.unsqueeze(-2))


def deep(x):
    """Plates at dims -3 and -1, none between; x is (a, b)."""
    with pyro.plate("a", x.shape[0], dim=-3), pyro.plate("b", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.unsqueeze(-2))


def chosen(x):
    """Some rows and some columns, which the model chooses; two sites in their cells."""
    with pyro.plate("a", 6, subsample_size=2, dim=-2) as i, pyro.plate("b", 8, subsample_size=4, dim=-1) as j:
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        s = pyro.sample("s", dist.Gamma(two(2.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, s + 0.1), obs=x[i][:, j])


def forest(x):
    """Three levels of normals: all, (J,) rows, (J, K) cells."""
    root = pyro.sample("root", dist.Normal(two(0.3)[0], 1.0))
    with pyro.plate("rows", x.shape[0], dim=-2):
        row = pyro.sample("row", dist.Normal(root, 0.8))
        with pyro.plate("cells", x.shape[1], dim=-1):
            cell = pyro.sample("cell", dist.Normal(row, 0.6))
            pyro.sample("x", dist.Normal(cell, 0.5), obs=x)


def mixed(x):
    """A global, a local and an enumerated latent."""
    a = pyro.sample("a", dist.LogNormal(two(0.0)[0], 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), a).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(two(0.5)[0]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + k.unsqueeze(-1), 0.5).to_event(1), obs=x)


class Regression(PyroModule):
    """A module with sampled weights, whose names hold dots."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1, **F64)
        self.linear.weight = PyroSample(dist.Normal(two(0.0)[0], 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(two(0.0), 1.0).to_event(1))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


class Outer(PyroModule):
    """A guide of the user's own, with an amortized one inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.loc = nn.Parameter(torch.zeros(2, **F64))

    def forward(self, x):
        values = self.inner(x)
        return values | {"center": pyro.sample("center", dist.Normal(self.loc, 1.0).to_event(1))}


def rows(count=4, width=2, seed=0):
    """Some data, always the same."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), **F64)


# name -> model, arguments, depth of its plates, scale of its groups by first site
ZOO = {
    "normal_rows": (normal_rows, (rows(),), 1, 1.0),
    "hierarchy": (hierarchy, (rows(),), 1, 1.0),
    "subsampled_hierarchy": (subsampled_hierarchy, (rows(),), 1, {"z": 4.0, "s": 4.0}),
    "dependent": (dependent, (rows(),), 1, 1.0),
    "dependent_rows": (dependent_rows, (rows(),), 1, 1.0),
    "crossed": (crossed, (rows(3, 4),), 2, 1.0),
    "nested": (nested, (rows(3, 4),), 2, 1.0),
    "side_by_side": (side_by_side, (rows(3), rows(5, seed=1)), 1, 1.0),
    "left_plate": (left_plate, (rows(),), 2, 1.0),
    "deep": (deep, (rows(2, 3),), 3, 1.0),
    "chosen": (chosen, (rows(6, 8),), 2, 6.0),
}


# --- masks


ROW_MASK = torch.tensor([True, False, True, True])
MASK = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
WHOLE = ROW_MASK.unsqueeze(-1)


def masked(kind):
    """A model with a masked latent `z`, and which unconstrained elements of each site count."""

    def model(x):
        with pyro.plate("data", len(x)):
            if kind == "outer":
                with poutine.mask(mask=ROW_MASK):
                    pair(x, dist.Normal(two(0.0, 1.0), 1.0).to_event(1))
            elif kind == "of one site":
                pair(x, dist.Normal(two(0.0, 1.0), 1.0).to_event(1).mask(ROW_MASK))
            elif kind == "inside to_event":
                pair(x, dist.Normal(two(0.0, 1.0), 1.0).expand([len(x), 2]).mask(MASK).to_event(1), MASK)
            elif kind == "inside, constrained":
                pair(x, dist.Gamma(two(2.0, 1.0), 1.0).expand([len(x), 2]).mask(MASK).to_event(1), MASK)

    def pair(x, prior, inner=WHOLE):
        z = pyro.sample("z", prior)
        s = pyro.sample("s", dist.LogNormal(two(0.0)[0], 1.0))
        likelihood = dist.Normal(z, s.unsqueeze(-1) + 0.1).expand([*z.shape]).mask(inner)
        pyro.sample("x", likelihood.to_event(1), obs=x)

    if kind == "outer":
        return model, {"z": WHOLE, "s": WHOLE}
    return model, {"z": WHOLE if kind == "of one site" else MASK}


MASKS = ["outer", "of one site", "inside to_event", "inside, constrained"]
