"""Plain SVI with a discrete latent: which cultivar is this wine, when nobody says how many grapes of each?

178 wines of three cultivars, 13 measurements each (Forina and others, UCI). Three normal clusters,
learned as ``pyro.param``, begin at k-means; the cluster of each wine is a discrete latent that is
*drawn*, not summed out. Nothing here is special to this package but the guide and its optimizer:
``SVI(model, guide, optimizer, elbo)``. As long as q is ignorant, all clusters are drawn to one place; so
it learns from simulations first, by ``ForwardKL``, while the clusters stay.

Look at the noise of the encoder's gradient. Drawing discrete latents needs score functions, which are
noisy. The guide takes the noise out with a baseline that is amortized, as q is;
``Discrete(baseline=None)`` shows what there is without. Summing the clusters out (``TraceEnum_ELBO``) is
the yardstick. Given the clusters, the exact probabilities are known, so that q can be judged, on wines
that training never saw, too.

    python examples/plain_svi.py           # two minutes
    python examples/plain_svi.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, save
from pyro.distributions import constraints
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO
from sklearn.cluster import KMeans
from sklearn.datasets import load_wine

from pyro_guides import AmortizedGuide, Discrete, gradient_noise, optim
from pyro_guides.objectives import ForwardKL

CLUSTERS, HELD_OUT = 3, 38


def wines():
    """Standardized measurements, and cultivars, in random order."""
    x, cultivar = load_wine(return_X_y=True)
    x, order = torch.as_tensor(x).float(), torch.randperm(len(x))
    return ((x - x.mean(0)) / x.std(0))[order], torch.as_tensor(cultivar)[order]


def clusters(x):
    """Weights, centres and spreads; centres begin where k-means puts them."""
    weight = pyro.param("weight", torch.full((CLUSTERS,), 1 / CLUSTERS), constraints.simplex)
    centre = pyro.param(
        "centre", lambda: torch.as_tensor(KMeans(CLUSTERS, n_init=10).fit(x.numpy()).cluster_centers_)
    )
    spread = pyro.param("spread", lambda: torch.ones(CLUSTERS, x.shape[1]), constraints.positive)
    return weight, centre, spread


def model(x):
    """Each wine is of one cluster."""
    weight, centre, spread = clusters(x)
    with pyro.plate("wine", len(x)):
        cluster = pyro.sample("cluster", dist.Categorical(weight))
        pyro.sample("x", dist.Normal(centre[cluster], spread[cluster]).to_event(1), obs=x)


@torch.no_grad()
def exact(x):
    """Log p(x), and the probabilities of the clusters of each wine, given what was learned."""
    weight, centre, spread = clusters(x)
    joint = weight.log() + dist.Normal(centre, spread).to_event(1).log_prob(x.unsqueeze(1))
    return joint.logsumexp(-1), joint.softmax(-1)


def probabilities(guide, x):
    """q(cluster | x), exactly: log q of each cluster."""
    values = torch.arange(CLUSTERS).unsqueeze(-1).expand(-1, len(x))
    return guide.posterior(x).log_prob({"cluster": values}).exp().T


def gap_of(guide, x):
    """KL(q || p) of the clusters, in nats per wine."""
    q, (_, p) = probabilities(guide, x), exact(x)
    return float((q * (q.clamp_min(1e-30).log() - p.clamp_min(1e-30).log())).sum(-1).mean())


def train(family, elbo, x, steps):
    """Plain SVI, and how noisy the gradient of its ELBO is at the beginning."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(model, family={"cluster": family}).setup(x)
    for loss in (ForwardKL(), elbo):  # q gets to know the clusters before these begin to move
        if loss is elbo:
            noise = gradient_noise(elbo, model, guide, x)
        svi = SVI(model, guide, optim.Adam({"lr": 0.01}), loss)
        for _ in range(steps):
            svi.step(x)
    return guide, noise


def purity(chances, cultivar):
    """The share of wines whose cluster is that of most of its cultivar."""
    counts = torch.zeros(CLUSTERS, 3).index_put_(
        (chances.argmax(-1), cultivar), torch.tensor(1.0), accumulate=True
    )
    return float(counts.max(-1).values.sum() / len(cultivar))


def draw(x, cultivar, chances, truth, options):
    """Wines in the plane of their first components, coloured by q; and q against the exact answer."""
    figure, (plane, check) = canvas(1, 2, width=10, height=4)
    place = (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).numpy()
    for kind, marker in enumerate("osv"):
        own = (cultivar == kind).numpy()
        plane.scatter(*place[own].T, c=chances[own].numpy(), marker=marker, label=f"cultivar {kind + 1}")
    plane.set(title="colour: q of the three clusters", xlabel="component 1", ylabel="component 2")
    plane.legend()
    check.plot(truth.flatten().numpy(), chances.flatten().numpy(), ".")
    check.plot([0, 1], [0, 1], "k:")
    check.set(xlabel="exact probability", ylabel="q", title="held-out wines")
    save(figure, options, "plain_svi")


def main(options):
    """Drawn with a baseline, without one, and summed out."""
    steps = 2 if options.short else 300
    x, cultivar = wines()
    train_x, test_x = x[HELD_OUT:], x[:HELD_OUT]
    ways = {
        "summed out": (Discrete(enumerate="parallel"), TraceEnum_ELBO(max_plate_nesting=1)),
        "drawn, no baseline": (Discrete(baseline=None), TraceGraph_ELBO()),
        "drawn": (Discrete(), TraceGraph_ELBO()),
    }
    print(f"{'clusters are':20s}{'log p(x)':>10s}{'gap':>8s}{'held out':>10s}{'purity':>8s}{'noise':>8s}")
    for name, (family, elbo) in ways.items():
        guide, noise = train(family, elbo, train_x, steps)
        evidence, gap = exact(train_x)[0].mean(), gap_of(guide, train_x)
        share = purity(probabilities(guide, x), cultivar)
        print(
            f"{name:20s}{evidence:10.3f}{gap:8.4f}{gap_of(guide, test_x):10.4f}{share:8.1%}"
            f"{noise.noise['encoder']:8.1f}",
            flush=True,
        )
    draw(test_x, cultivar[:HELD_OUT], probabilities(guide, test_x), exact(test_x)[1], options)


if __name__ == "__main__":
    main(begin(__doc__))
