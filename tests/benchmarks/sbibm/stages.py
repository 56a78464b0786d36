"""What a user does with a trained guide when data come: draw, refine λ of these data, weigh draws.

Draws are resampled from λ as it is or as refined, for each observation from whichever has the larger
effective size. That needs nothing but the model: reverse KL may give up what weights would have needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_guides.posterior import Posterior
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.sbibm import stored
from tests.benchmarks.sbibm.training import trained

__all__ = ["STAGES", "Outcome", "Request", "study"]

STAGES = ("amortized", "resampled")  # those whose draws are scored


@dataclass(frozen=True)
class Request:
    """What is to be done for one task.

    Attributes:
        task: its name.
        share: of the steps that training is to take.
        observations: how many to look at.
        draws: how many are scored.
        proposals: how many draws resampling chooses from.
    """

    task: str
    share: float = 1.0
    observations: int = stored.OBSERVATIONS
    draws: int = 10_000
    proposals: int = 100_000


@dataclass(frozen=True)
class Outcome:
    """What one task gave.

    Attributes:
        task: its name.
        draws: by stage, ``(observations, draws, n)``.
        gaps: KL(q‖p) in nats, log p(x) minus the ELBO, by observation: amortized and refined.
        efficiency: effective size of the draws that were resampled over their number, by observation.
        distinct: the share of the resampled draws that differ.
        training: seconds; and how many data sets were simulated.
        serving: seconds that drawing, refinement and resampling took, for all observations together.
    """

    task: str
    draws: dict[str, np.ndarray]
    gaps: dict[str, np.ndarray]
    efficiency: np.ndarray
    distinct: np.ndarray
    training: float
    simulations: int
    serving: float


def study(request: Request) -> Outcome:
    """Train for a task and go through all stages."""
    found = trained(request.task, request.share)
    x, evidence = (
        given(request.task)[: request.observations] for given in (stored.observations, stored.log_evidence)
    )
    with isolated():
        pyro.set_rng_seed(SEED)
        start = time.perf_counter()
        amortized = found.guide.posterior(x, num_draws=request.draws)
        refined = amortized.refine()
        proposals = [Posterior(q.query, num_draws=request.proposals) for q in (amortized, refined)]
        size = torch.stack([q.effective_size for q in proposals])  # (2, observations)
        first, second = (_array(q.resample(request.draws)) for q in proposals)
        resampled = np.where((size[1] > size[0]).numpy()[:, None, None], second, first)
        return Outcome(
            request.task,
            {"amortized": _array(amortized), "resampled": resampled},
            {
                "amortized": (evidence - amortized.elbo).numpy(),
                "refined": (evidence - refined.elbo).numpy(),
            },
            (size.amax(0) / request.proposals).numpy(),
            np.array([len(np.unique(d, axis=0)) / len(d) for d in resampled]),
            found.seconds,
            found.simulations,
            time.perf_counter() - start,
        )


def _array(posterior: Posterior) -> np.ndarray:
    """The draws by observation."""
    theta: Tensor = posterior.draws["theta"]
    return theta.movedim(1, 0).numpy()
