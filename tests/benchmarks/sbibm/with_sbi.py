"""Neural posterior estimation by the package sbi, in an interpreter that has it: ``with_sbi.py IN OUT``.

IN holds simulations ``theta`` and ``x``, the edges ``low`` and ``high`` of a uniform prior or the ``loc`` and
``scale`` of a log-normal one, ``observations``, and how many draws to take. OUT gets ``draws``, the seconds
of training and of drawing. Settings are sbi's own, but for a neural spline flow as the benchmark has it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform, MultipleIndependent


def prior_of(given: dict[str, torch.Tensor]) -> torch.distributions.Distribution:
    """The prior that IN describes."""
    if "low" in given:
        return BoxUniform(given["low"], given["high"])
    pairs = zip(given["loc"], given["scale"], strict=True)
    return MultipleIndependent([torch.distributions.LogNormal(a.view(1), b.view(1)) for a, b in pairs])


def main(source: str, target: str) -> None:
    """Train on the simulations, draw for each observation."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with np.load(source) as stored:
        given = {name: torch.from_numpy(stored[name]) for name in stored}
    start = time.perf_counter()
    inference = NPE(prior=prior_of(given), density_estimator=posterior_nn("nsf"))
    inference.append_simulations(given["theta"], given["x"])
    inference.train()
    trained = time.perf_counter()
    posterior = inference.build_posterior()
    count = int(given["num_draws"])
    draws = [
        posterior.sample((count,), x=x.unsqueeze(0), show_progress_bars=False) for x in given["observations"]
    ]
    np.savez(
        target,
        draws=torch.stack(draws).numpy(),
        training=trained - start,
        drawing=time.perf_counter() - trained,
        epochs=inference.summary["epochs_trained"][-1],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
