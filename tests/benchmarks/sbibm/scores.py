"""The classifier two-sample test, as the benchmark defines it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor

from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.sbibm.classifiers import accuracies

__all__ = ["c2st"]

FOLDS = 5


def c2st(reference: Sequence[np.ndarray], draws: Sequence[np.ndarray]) -> np.ndarray:
    """How well classifiers tell draws from reference draws: 0.5 is best, 1 is worst.

    Each pair is measured in means and sds of its reference draws. Classifiers have two hidden layers of 10 d
    units each; a score is the mean accuracy over five folds.

    Args:
        reference: for each pair, ``(n, d)``.
        draws: for each pair, ``(n, d)``.

    Returns:
        The scores, ``(pairs,)``.
    """
    pairs = torch.stack([_joined(a, b) for a, b in zip(reference, draws, strict=True)])
    size, width = len(reference[0]), 10 * pairs.shape[-1]
    labels = torch.cat([torch.zeros(size), torch.ones(pairs.shape[1] - size)])
    splits = KFold(FOLDS, shuffle=True, random_state=1).split(np.empty(len(labels)))
    folds = [(torch.from_numpy(learned), torch.from_numpy(held_out)) for learned, held_out in splits]
    with isolated():
        torch.manual_seed(SEED)
        return accuracies(pairs, labels, folds, width).mean(1).numpy()


def _joined(reference: np.ndarray, draws: np.ndarray) -> Tensor:
    mean, sd = reference.mean(0), reference.std(0, ddof=1)
    return torch.from_numpy(np.concatenate([(reference - mean) / sd, (draws - mean) / sd])).float()
