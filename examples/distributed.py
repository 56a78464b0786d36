"""Amortized posteriors of 1,797 handwritten digits, trained by several processes that share every batch.

The decoder network of quickstart.py and its encoder are trained jointly. Each process computes the gradient
of its share of a batch, all average, and all make the same step: the result is that of one process, up to
noise. Each prints how many images a second it got through; the validation ELBO is the same in all.

    python examples/distributed.py --devices 2                    # starts the second process itself
    torchrun --standalone --nproc_per_node 2 examples/distributed.py --devices 2  # or torchrun does
    python examples/distributed.py --devices 2 --accelerator gpu  # one process per GPU
    python examples/distributed.py --devices 2 --short            # 20 steps only

A network this small gains nothing from it on one machine: a step takes milliseconds, as does an average.
"""

import argparse
import os

import pyro
import torch
from quickstart import DecoderModel, load_images

from pyro_guides import AmortizedGuide, fit


def main(devices, accelerator, steps, batch_size):
    """Train, and say how fast and how well."""
    torch.set_num_threads(1)  # processes on one machine share its cores
    pyro.set_rng_seed(0)
    pixels, _, inked = load_images()
    images = torch.tensor(pixels[:, inked], dtype=torch.float32)
    model = DecoderModel(images.shape[-1])
    guide = AmortizedGuide(model)
    result = fit(
        model,
        guide,
        images,
        batch_size=batch_size,
        max_steps=steps,
        seed=0,
        devices=devices,
        accelerator=accelerator,
    )
    # From here on, too, every process runs this script.
    rank, world = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))), devices
    rows = result.steps * (batch_size // world)
    # One write each, so that lines of different processes do not mix.
    print(f"process {rank} of {world}: {rows / result.seconds:,.0f} rows a second\n", end="", flush=True)
    if rank == 0:
        best = result.best
        print(f"validation ELBO: {best.elbo:.3f} ± {best.error:.3f} nats per image", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="how many processes")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--short", action="store_true", help="20 steps only: does it run?")
    arguments = parser.parse_args()
    steps = 20 if arguments.short else arguments.steps
    main(arguments.devices, arguments.accelerator, steps, arguments.batch_size)
