"""Many small classifiers trained side by side, by the recipe of scikit-learn's ``MLPClassifier``.

One such network costs little but overhead, and a score needs five of them, one for each fold. All networks
here step together, as one batched product of matrices; each stops by the same rule as alone. The recipe:
two hidden layers of rectified units, uniform initial weights and biases (Glorot), Adam at 0.001 on shuffled
batches of 200, an L2 penalty of 1e-4 over the size of the batch, and a stop when the training loss of an
epoch has not been 1e-4 below the lowest for more than ten epochs in a row.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["accuracies"]

BATCH = 200
RATE, DECAYS = 1e-3, (0.9, 0.999)
PENALTY = 1e-4
TOLERANCE, PATIENCE = 1e-4, 10
EPOCHS = 10_000


class Networks:
    """Networks of one shape, and their Adam.

    Args:
        count: N, how many.
        widths: of all layers, the input first.
    """

    def __init__(self, count: int, widths: tuple[int, ...]) -> None:
        self.weights, self.biases = [], []
        for i, o in pairwise(widths):
            bound = math.sqrt(6.0 / (i + o))
            self.weights.append(torch.empty(count, i, o).uniform_(-bound, bound).requires_grad_())
            self.biases.append(torch.empty(count, 1, o).uniform_(-bound, bound).requires_grad_())
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    @property
    def parameters(self) -> list[Tensor]:
        """All of them, weights first."""
        return [*self.weights, *self.biases]

    def logits(self, x: Tensor) -> Tensor:
        """``(N, rows, widths[0]) -> (N, rows)``."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).squeeze(-1)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step of Adam for each; the losses before it, ``(N,)``."""
        fit = binary_cross_entropy_with_logits(self.logits(x), labels, reduction="none").mean(-1)
        penalty = torch.stack([w.square().sum((1, 2)) for w in self.weights]).sum(0)
        losses = fit + 0.5 * PENALTY / x.shape[1] * penalty
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        self.steps += 1
        first, second = (1.0 - decay**self.steps for decay in DECAYS)
        with torch.no_grad():
            for p, g, m, s in zip(self.parameters, gradients, self.means, self.squares, strict=True):
                m.lerp_(g, 1.0 - DECAYS[0])
                s.mul_(DECAYS[1]).addcmul_(g, g, value=1.0 - DECAYS[1])
                p.addcdiv_(
                    m, s.sqrt().add_(1e-8 * math.sqrt(second)), value=-RATE * math.sqrt(second) / first
                )
        return losses.detach()

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Go on with some of them, boolean ``(N,)``."""
        for tensors in (self.means, self.squares):
            tensors[:] = [tensor[rows] for tensor in tensors]
        for tensors in (self.weights, self.biases):
            tensors[:] = [tensor[rows].requires_grad_() for tensor in tensors]


def accuracies(x: Tensor, labels: Tensor, folds: list[tuple[Tensor, Tensor]], width: int) -> Tensor:
    """The share of held-out rows that is classified rightly, ``(sets, folds)``.

    Args:
        x: several data sets of equal size, ``(sets, rows, features)``.
        labels: zero or one, ``(rows,)``, the same in each.
        folds: which rows are learned from, and which are held out; as many in each fold.
        width: of both hidden layers.
    """
    sets, found = len(x), torch.zeros(len(x) * len(folds))
    which = torch.arange(sets).repeat_interleave(len(folds))  # the data set of each network
    learned = torch.stack([fold[0] for fold in folds]).repeat(sets, 1)
    held_out = torch.stack([fold[1] for fold in folds]).repeat(sets, 1)
    alive, networks = torch.arange(len(which)), Networks(len(which), (x.shape[-1], width, width, 1))
    best, waited = torch.full((len(which),), math.inf), torch.zeros(len(which))
    for _ in range(EPOCHS):
        losses = _epoch(networks, x, labels, which[alive], learned[alive])
        waited = torch.where(losses > best - TOLERANCE, waited + 1, torch.zeros_like(waited))
        best = torch.minimum(best, losses)
        if bool((done := waited > PATIENCE).any()):
            at = which[alive].unsqueeze(1), held_out[alive]
            with torch.no_grad():
                right = (networks.logits(x[at]) > 0) == labels[at[1]].bool()
            found[alive[done]] = right[done].float().mean(-1)
            networks.keep(~done)
            alive, best, waited = alive[~done], best[~done], waited[~done]
        if not len(alive):
            break
    return found.unflatten(0, (sets, len(folds)))


def _epoch(networks: Networks, x: Tensor, labels: Tensor, which: Tensor, learned: Tensor) -> Tensor:
    """One pass over the rows, in an order of each network's own; its mean losses."""
    order = learned.gather(1, torch.rand(learned.shape).argsort(1))
    total = torch.zeros(len(which))
    for rows in order.split(BATCH, dim=1):
        total += networks.step(x[which.unsqueeze(1), rows], labels[rows]) * rows.shape[1]
    return total / order.shape[1]
