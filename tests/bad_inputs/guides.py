"""Guides that cannot be made, or that no call suits."""

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_value

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, Discrete, FullRankNormal

from .case import Case, table
from .models import INF, NAN, ONES, ZEROS, Encoder, X, grid, one, rows, sequential, twice

# Guides that no call suits: model, options, error, message.
# fmt: off
GUIDES_OF_NO_USE = {
    "inputs: array": (rows, {"inputs": lambda x: x.numpy()}, TypeError,
        "inputs(...) for latents 'z', 's' is a ndarray, expected a torch.Tensor"),
    "inputs: integers": (rows, {"inputs": lambda x: x.long()}, TypeError,
        "inputs(...) ... torch.int64 ... .float()"),
    "inputs: rows": (rows, {"inputs": lambda x: x[:7]}, ValueError, "inputs(...) ... (7, 3) ... ('data', 8)"),
    "inputs: rows, by plate": (rows, {"inputs": {"data": lambda x: x[:7]}}, ValueError,
        "'z', 's' ... ('data', 8)"),
    "nothing fits": (grid, {"amortize": ["column"], "inputs": lambda x: x}, ValueError,
        "'z' ... ('column', 3)"),
    "two plates fit": (lambda x: grid(x, 8, 8), {}, ValueError,
        "(8, 3) ... ['row'] or ['column'] ... amortize=["),
    "one encoder per site": (rows, {"encoder": {"z": Encoder(), "s": Encoder()}}, ValueError,
        "'z', 's' ... ['z', 's'] name different choices"),
    "one encoder per plate": (grid, {"encoder": {"row": MLP(), "column": MLP()}}, ValueError,
        "'z' ... 'row', 'column' ... different choices ... name the site"),
    "family of": (rows, {"family": {"zed": DiagonalNormal()}}, ValueError,
        "family={...} names ['zed'] ... ['z', 's'] ... ['data']"),
    "encoder of": (rows, {"encoder": {"x": MLP()}}, ValueError,
        "encoder={...} names ['x'] ... ['z', 's'] ... ['data']"),
    "inputs of": (rows, {"inputs": {"dat": len}}, ValueError,
        "inputs={...} names ['dat'] ... ['z', 's'] ... ['data']"),
    "amortize": (rows, {"amortize": ["z"]}, ValueError, "amortize=['z'] names ['z'] ... ['data']"),
    "no latents": (lambda x: None, {}, RuntimeError, "the model has no latent variables ... obs="),
    "two of a name": (twice, {}, ValueError, "two sites named 'z' ... its own name"),
    "sequential plate": (sequential, {}, NotImplementedError,
        "'z_0' lies in the sequential plate 'data' ... with pyro.plate("),
    "no plate": (one(fn=dist.Normal(ZEROS, 1.0)), {}, ValueError,
        "'z' has batch shape (8,) ... dim -1 ... .to_event("),
    "count": (one("k", dist.Poisson(3.0)), {}, ValueError,
        "'k' is discrete ... no list of at most 1024 values ... truncate a count ... hide=['k']"),
    "spherical": (one("v", dist.VonMises3D(torch.ones(3))), {}, ValueError,
        "'v' lives on a sphere ... ProjectedNormalReparam"),
    "init: edge": (rows, {"init_loc_fn": init_to_value(values={"s": ZEROS})}, ValueError,
        "'s' ... edge of its support ... inside"),
    "init: outside": (rows, {"init_loc_fn": init_to_value(values={"s": -ONES})}, ValueError,
        "'s' ... support ... inside"),
    "order: unknown": (rows, {"order": ["q"]}, ValueError, "order names ['q'] ... ['z', 's']"),
    "order: part": (rows, {"order": ["z"]}, ValueError, "order must name every latent, but ['s']"),
    "order: twice": (rows, {"order": ["z", "z", "s"]}, ValueError, "names a latent twice"),
    "given: unknown": (rows, {"given": {"q": ["z"]}}, ValueError, "given names ['q'] ... ['z', 's']"),
    "given: cycle": (rows, {"given": {"z": ["s"], "s": ["z"]}}, ValueError, "a cycle among ['z', 's']"),
    "given: itself": (rows, {"given": {"z": ["z"]}}, ValueError, "makes 'z' depend on itself"),
    "family: discrete": (rows, {"family": Discrete()}, ValueError,
        "Discrete() is for discrete latents ... FullRankNormal()"),
    "init: not a number": (rows, {"init_loc_fn": lambda site: "a"}, TypeError,
        "init_loc_fn must return a tensor for 'z', got 'a'"),
    "init: shape": (rows, {"init_loc_fn": lambda site: torch.zeros(3)}, ValueError,
        "init_loc_fn starts latent site 'z' ... shape (3,), expected (8,)"),
    "init: dimensions": (rows, {"init_loc_fn": lambda site: torch.zeros(2, 8)}, ValueError,
        "init_loc_fn starts latent site 'z' ... shape (2, 8), expected (8,)"),
    "init: NaN": (rows, {"init_loc_fn": lambda site: torch.full((8,), NAN)}, ValueError,
        "site 'z' ... start it inside"),
    "improper prior": (one(fn=dist.ImproperUniform(dist.constraints.real, (), ())), {}, NotImplementedError,
        "init_loc_fn has no value for latent site 'z' ... init_to_feasible"),
    "inputs: none": (rows, {"inputs": lambda x: None}, TypeError, "is a NoneType, expected a torch.Tensor"),
    "inputs: number": (rows, {"inputs": lambda x: 3.0}, TypeError, "is a float, expected a torch.Tensor"),
    "inputs: empty": (rows, {"inputs": lambda x: {}}, TypeError, "0 float tensors ... at least one"),
    "inputs: dict of numbers": (rows, {"inputs": lambda x: {"a": 3}}, TypeError,
        "['a'] is a int, expected a torch.Tensor"),
    "inputs: three": (rows, {"inputs": lambda x: (x, x, x)}, TypeError, "expected (features, index)"),
    "inputs: float index": (rows, {"inputs": lambda x: (x, x[:, 0])}, TypeError,
        "expected (features, index) with an integer tensor"),
    "inputs: index too large": (rows,
        {"inputs": lambda x: (x, torch.full((8,), 99)), "encoder": DeepSet(8)}, ValueError,
        "the index of inputs(...) ... from 99 to 99 ... plate 'data' has 8 elements"),
    "inputs: negative index": (rows,
        {"inputs": lambda x: (x, torch.full((8,), -1)), "encoder": DeepSet(8)}, ValueError,
        "runs from -1 to -1 ... from 0 to 7"),
    "inputs: NaN": (rows, {"inputs": lambda x: x * NAN}, ValueError, "holds NaN in 8 of 8 rows"),
}
# What the constructor refuses at once: arguments, error, message.
ARGUMENTS = {
    "init_scale: 0": ({"init_scale": 0.0}, ValueError, "init_scale must be positive ... 0.0"),
    "init_scale: -1": ({"init_scale": -1}, ValueError, "init_scale must be positive ... -1"),
    "init_scale: NaN": ({"init_scale": NAN}, ValueError, "init_scale must be positive ... nan"),
    "init_scale: inf": ({"init_scale": INF}, ValueError, "init_scale must be positive ... inf"),
    "init_scale: tiny": ({"init_scale": 1e-9}, ValueError, "init_scale must be ... 1e-06 ... 1e-09"),
    "init_scale: string": ({"init_scale": "0.1"}, TypeError, "init_scale must be a number, got '0.1'"),
    "init_scale: bool": ({"init_scale": True}, TypeError, "init_scale must be a number, got True"),
    "family: string": ({"family": "FullRankNormal"}, TypeError,
        "family must be ... FullRankNormal(), got 'FullRankNormal'"),
    "family: class": ({"family": FullRankNormal}, TypeError,
        "family must be ... FullRankNormal(), got <class"),
    "family: dict of classes": ({"family": {"z": DiagonalNormal}}, TypeError,
        "family must be ... got <class"),
    "encoder: function": ({"encoder": torch.tanh}, TypeError,
        "encoder must be a torch.nn.Module, got <built-in"),
    "encoder: class": ({"encoder": MLP}, TypeError, "encoder must be a torch.nn.Module, got <class"),
    "encoder: dict": ({"encoder": {"data": len}}, TypeError,
        "encoder must be a torch.nn.Module, got <built-in"),
    "inputs: tensor": ({"inputs": X}, TypeError, "inputs must be a function of the model's arguments, got"),
    "inputs: dict": ({"inputs": {"data": 0}}, TypeError,
        "inputs must be a function of the model's arguments, got 0"),
    "amortize: string": ({"amortize": "data"}, TypeError,
        "amortize must be a list of plate names ... 'data'"),
    "amortize: bool": ({"amortize": True}, TypeError, "amortize must be a list of plate names ... True"),
    "init_loc_fn": ({"init_loc_fn": 0.0}, TypeError, "init_loc_fn must be a function ... 0.0"),
    "create_plates": ({"create_plates": ["data"]}, TypeError,
        "create_plates must be a function ... ['data']"),
    "name": ({"name": 3}, TypeError, "name must be ... 3"),
    "model": ({"model": "rows"}, TypeError, "model must be ... 'rows'"),
    "condition_on_upstream": ({"condition_on_upstream": "no"}, TypeError,
        "condition_on_upstream must be True or False, got 'no'"),
    "order: string": ({"order": "z"}, TypeError, "order must be a list of names of latents, got 'z'"),
    "given: string": ({"given": "z"}, TypeError, "given must be a dict ... 'z'"),
    "given: list": ({"given": ["z"]}, TypeError, "given must be a dict ... ['z']"),
    "given: string inside": ({"given": {"z": "s"}}, TypeError, "given must be a dict ... {'z': 's'}"),
    "family: list": ({"family": [FullRankNormal()]}, TypeError, "family must be a family ... [FullRank"),
    "family: None inside": ({"family": {"z": None}}, TypeError, "family must be a family ... None"),
    "encoder: list": ({"encoder": [MLP()]}, TypeError, "encoder must be a torch.nn.Module, got [MLP"),
    "amortize: numbers": ({"amortize": [3]}, TypeError, "amortize must be a list of plate names ... [3]"),
}
# fmt: on


def called(model, options):
    return lambda: AmortizedGuide(model, **options)(X)


def made(options):
    return lambda: AmortizedGuide(**{"model": rows} | options)


CASES: list[Case] = [
    *table("guide", {name: (called(*row[:2]), *row[2:]) for name, row in GUIDES_OF_NO_USE.items()}),
    *table("argument", {name: (made(row[0]), *row[1:]) for name, row in ARGUMENTS.items()}),
]
