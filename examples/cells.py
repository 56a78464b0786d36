"""Single cells: can 765 noisy counts be told in eight numbers, and does the size of the library matter?

The counts of 700 blood cells are negative binomial. A latent ``state`` of eight numbers, a network and a
softmax say which share each gene has; a latent ``size`` says how much of the cell was sequenced. This is
the model of scVI (Lopez and others 2018) in its plainest form. The guide is one line: it draws state and
size jointly for each cell, from the logarithms of its counts, and the model is trained along with it.

Look at the map: cells are coloured by types that training never saw. The printed accuracy is that of five
nearest neighbours among the other cells; log counts and their principal components are the yardsticks.

Data: Grace Zheng and others, Nature Communications 2017 (10x Genomics, CC BY 4.0), as reduced by scanpy.

    python examples/cells.py           # a minute
    python examples/cells.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save
from torch import nn

from pyro_guides import AmortizedGuide, fit

STATES = 8


class Cells(nn.Module):
    """state ~ N(0, I), size ~ LogNormal, count ~ NegativeBinomial(mean = size * share(state))."""

    def __init__(self, counts):
        super().__init__()
        log_size = counts.sum(-1).log()
        self.prior = float(log_size.mean()), float(log_size.std())
        shares = nn.Linear(100, counts.shape[1])
        with torch.no_grad():  # begins with the shares that genes have in all cells together
            shares.bias.copy_((counts.sum(0) / counts.sum()).log())
        self.decoder = nn.Sequential(nn.Linear(STATES, 100), nn.SiLU(), shares)
        self.log_dispersion = nn.Parameter(torch.zeros(counts.shape[1]))

    def forward(self, counts):
        """The Pyro model."""
        pyro.module("cells", self)
        with pyro.plate("cell", len(counts)):
            state = pyro.sample("state", dist.Normal(torch.zeros(STATES), 1.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(*self.prior))
            log_mean = size.log().unsqueeze(-1) + self.decoder(state).log_softmax(-1)
            count = dist.NegativeBinomial(self.log_dispersion.exp(), logits=log_mean - self.log_dispersion)
            pyro.sample("counts", count.to_event(1), obs=counts)


def accuracy(features, types, neighbours=5):
    """How often the types of the nearest other cells, by majority, are a cell's own."""
    distance = torch.cdist(features, features).fill_diagonal_(torch.inf)
    nearest = types[distance.topk(neighbours, largest=False).indices]
    return float((nearest.mode(-1).values == types).float().mean())


def components(x, count):
    """The first principal components."""
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, :count] * s[:count]


def log_normalized(counts):
    """Log counts as if each cell had as many: the usual preparation."""
    return (counts / counts.sum(-1, keepdim=True) * counts.sum(-1).median()).log1p()


def draw(states, sizes, types, names, counts, options):
    """States in the plane of their first components; sizes against what was counted."""
    figure, (plane, library) = canvas(1, 2, width=11, height=4.5, width_ratios=(3, 2))
    place = components(states, 2).numpy()
    for kind, name in enumerate(names):
        own = (types == kind).numpy()
        plane.plot(*place[own].T, ".", markersize=5, color=f"C{kind}", label=name)
    plane.set(title="states, coloured by the type of cell", xlabel="component 1", ylabel="component 2")
    plane.legend(fontsize="x-small", markerscale=2)
    library.loglog(counts.sum(-1).numpy(), sizes.numpy(), ".", markersize=3)
    library.set(xlabel="counts in the cell", ylabel="size, posterior mean", title="size of the library")
    save(figure, options, "cells")


def main(options):
    """Fit, compare with the yardsticks, draw the map."""
    data = load("cells")
    counts, types, names = data["counts"].float(), data["cell_type"], data["cell_type_names"]
    steps, draws = (3, 20) if options.short else (1500, 200)
    model = Cells(counts)
    guide = AmortizedGuide(model, inputs=lambda counts: counts.log1p())
    result = fit(model, guide, counts, max_steps=steps, learning_rate=3e-3, seed=0)
    posterior = guide.posterior(counts, num_draws=draws)
    states, sizes = posterior.mean()["state"], posterior.mean()["size"]

    print(f"{result.seconds:.0f} s; ELBO of held-out cells {result.best.elbo:.1f} nats per cell")
    print("Nearest neighbours of the same type:")
    logs = log_normalized(counts)
    kinds = {
        "765 log counts": logs,
        f"{STATES} principal components of them": components(logs, STATES),
        f"{STATES} states, posterior means": states,
    }
    for name, features in kinds.items():
        print(f"  {name:38s}{accuracy(features, types):.1%}")
    share = (sizes.log() - counts.sum(-1).log()).std() / counts.sum(-1).log().std()
    print(f"Log sizes differ from log counts by {share:.2f} of the spread of these")
    draw(states, sizes, types, names, counts, options)


if __name__ == "__main__":
    main(begin(__doc__))
