"""What the examples share: how they start, where their data lie, and how they save pictures."""

import argparse
from pathlib import Path

import numpy as np
import pyro
import torch

DATA = Path(__file__).parent / "data"


def begin(title):
    """Read ``--short`` and ``--output`` from the command line, and fix the seed."""
    parser = argparse.ArgumentParser(description=title.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps only: does it run?")
    parser.add_argument("--output", type=Path, default=Path("examples/output"), help="folder of pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # layers this small are slower on several threads
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return options


def load(name):
    """The arrays of a data file: floats in float32, whole numbers as int64, names as a list."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: _convert(file[key]) for key in file}


def _convert(array):
    if array.dtype.kind == "U":
        return array.tolist()
    return torch.as_tensor(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


def canvas(rows=1, columns=1, width=9.0, height=3.5, **options):
    """A figure and its axes, for files only."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def save(figure, options, name):
    """Write the picture, and say where."""
    import matplotlib.pyplot as plt

    path = options.output / f"{name}.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"Saved {path}")
