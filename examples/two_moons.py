"""Two moons: the posterior of a simulator that has no density.

A simulator makes a point from two parameters and some noise that no one sees; its likelihood is never
written down. ``ForwardKL`` needs draws alone: parameters from the prior, points from the simulator, and
the guide learns to tell the former from the latter (neural posterior estimation). So the observed site's
distribution has a ``sample`` and no ``log_prob``, and the arguments' values do not matter in training,
only their shapes.

Look at the picture: for each of three observations the posterior is two crescents that face each other. A
full-rank normal covers both with one blob; a mixture and a flow should find them. The referee are
draws of the exact posterior from the simulation-based inference benchmark, and its score: how often does
a classifier tell the draws from these? 50 % is perfect, 100 % is not at all.

    python examples/two_moons.py           # three minutes
    python examples/two_moons.py --short
"""

import math

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save
from pyro.infer import SVI
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier

from pyro_guides import AmortizedGuide, FullRankNormal, NormalizingFlow, NormalMixture, optim
from pyro_guides.objectives import ForwardKL

FAMILIES = {"full rank": FullRankNormal(), "mixture of 12": NormalMixture(12), "flow": NormalizingFlow()}


class Moon(dist.TorchDistribution):
    """The simulator: a noisy half circle of radius 0.1 around a point that theta says, up to a reflection."""

    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, theta):
        self.theta = theta
        super().__init__(theta.shape[:-1], torch.Size([2]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        """As every distribution of Pyro can."""
        return Moon(self.theta.expand(*batch_shape, 2))

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        """Run it."""
        theta = self.theta.expand(sample_shape + self.theta.shape)
        angle = math.pi * (torch.rand(theta.shape[:-1]) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(theta.shape[:-1])
        circle = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], dim=-1)
        shift = torch.stack([-theta.sum(-1).abs(), theta.diff(dim=-1).squeeze(-1)], dim=-1)
        return circle + shift / math.sqrt(2.0)

    def log_prob(self, value):
        """Nobody knows."""
        raise NotImplementedError("a simulator has no density")


def model(x):
    """A pair of parameters, and what the simulator makes of it, per data set."""
    with pyro.plate("data set", len(x)):
        theta = pyro.sample("theta", dist.Uniform(-torch.ones(2), 1.0).to_event(1))
        pyro.sample("x", Moon(theta), obs=x)


def trained(family, steps, batch=512):
    """Simulations are drawn anew in every step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(model, family=family)
    adam = optim.Adam({"lr": 3e-3}, {"clip_norm": 10.0}, schedule=lambda step: max(0.02, 1 - step / steps))
    svi = SVI(model, guide, adam, ForwardKL())
    losses = [svi.step(torch.zeros(batch, 2)) / batch for _ in range(steps)]
    return guide, sum(losses[-50:]) / len(losses[-50:])


def told_apart(draws, reference):
    """How often a classifier tells draws from reference draws."""
    features = ((torch.cat([draws, reference]) - reference.mean(0)) / reference.std(0)).numpy()
    labels = torch.arange(2).repeat_interleave(len(draws)).numpy()
    classifier = MLPClassifier((20, 20), max_iter=300, early_stopping=True, random_state=1)
    return cross_val_score(classifier, features, labels, cv=3).mean()


def draw(found, reference, options):
    """One row for each observation: exact draws, then those of each family."""
    names = ["exact", *found]
    figure, axes = canvas(3, len(names), width=10, height=7, sharex=True, sharey=True)
    for i, row in enumerate(axes):
        for ax, name in zip(row, names, strict=True):
            points = (reference if name == "exact" else found[name])[i][:1500]
            ax.plot(*points.T.numpy(), ".", markersize=1, color="k" if name == "exact" else "C0")
            ax.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name)
    save(figure, options, "two_moons")


def main(options):
    """Train on simulations alone, then show real observations."""
    steps, draws = (1, 30) if options.short else (1000, 2000)
    data = load("two_moons")
    observations, reference = data["observations"], data["reference_samples"][:, :draws]
    print("Five observations; a classifier tells draws from exact ones in so many of 100 cases:")
    print(f"{'family':16s}{'-log q':>8s}" + "".join(f"{i + 1:>8d}" for i in range(5)) + f"{'mean':>8s}")
    found = {}
    for name, family in FAMILIES.items():
        guide, loss = trained(family, steps)
        theta = guide.posterior(observations, num_draws=draws).draws["theta"].transpose(0, 1)
        found[name] = theta
        scores = [told_apart(theta[i], reference[i]) for i in range(5)]
        mean = sum(scores) / 5
        print(f"{name:16s}{loss:8.2f}" + "".join(f"{100 * s:8.0f}" for s in (*scores, mean)), flush=True)
    draw(found, reference, options)


if __name__ == "__main__":
    main(begin(__doc__))
