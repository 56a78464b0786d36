"""What one encoder for all rows loses: against exact answers, and family by family on real images.

Two problems. *Factor models* of digits have a posterior in closed form: the ELBO of each family is compared
with the exact evidence and, for diagonal normals, with the best that any of them can reach. *Autoencoders*
of binary digits have no exact answer: families are compared with each other on held-out images, and the gap
between ELBO and evidence is split into what the encoder and what the family costs. In published
autoencoders (32 to 64 latents, all of MNIST, hundreds of epochs) flows gain 2 to 3 nats of ELBO over
diagonal normals; that is the bar here, with a third of the images.
"""

from __future__ import annotations

from tests.benchmarks.report import Report, Tier
from tests.benchmarks.rows import linear, vae

__all__ = ["run"]


def run(tier: Tier) -> Report:
    """Both problems."""
    parts = [linear.run(tier), vae.run(tier)]
    return Report(
        [result for part in parts for result in part.results],
        [table for part in parts for table in part.tables],
    )
