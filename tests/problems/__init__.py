"""Problems with exact or trusted answers: Pyro models as users write them, their data, and what is known.

Nothing here knows of guides. ``tests/test_problems.py`` checks every answer; a ``README.md`` beside the
files, in ``tests/data`` and ``examples/data``, names the source of each.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
FOLDERS = ROOT / "tests" / "data", ROOT / "examples" / "data"


def path_of(name):
    """Return the data file of this name, be it the tests' own or one of the examples'."""
    return next(path for folder in FOLDERS if (path := folder / f"{name}.npz").exists())


def stored(name, dtype=torch.float32):
    """Return a file's arrays as tensors: floats in ``dtype``, whole numbers as int64; names as a list."""
    with np.load(path_of(name), allow_pickle=False) as file:
        return {key: _convert(file[key], dtype) for key in file}


def _convert(array, dtype):
    if array.dtype.kind == "U":
        return array.tolist()
    return torch.as_tensor(array).to(dtype if array.dtype.kind == "f" else torch.int64)


class Reference(NamedTuple):
    """Posterior means and sds of scalars by name: ``alpha[1]`` is the first element of the site ``alpha``."""

    names: list
    mean: torch.Tensor
    sd: torch.Tensor

    def sites(self):
        """Return ``{site: (means, sds)}``, each in the site's natural shape."""
        found = {}
        for i, name in enumerate(self.names):
            found.setdefault(name.split("[")[0], []).append(i)
        return {
            site: (self.mean[i], self.sd[i])
            for site, rows in found.items()
            for i in [rows if f"{site}[1]" in self.names else rows[0]]
        }
