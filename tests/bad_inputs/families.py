"""Bad arguments of families, encoders and optimizers."""

import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_guides import (
    MLP,
    DeepSet,
    DiagonalNormal,
    Discrete,
    FullRankNormal,
    GRUEncoder,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    SetTransformer,
    Standardize,
    ZukoFlow,
    optim,
)

from .case import table
from .models import NAN, X, new_guide, whole_rows

INDEX = torch.zeros(4, dtype=torch.long)


def zuko(**options):
    return ZukoFlow(lambda features, context: 3, **options)


def step(optimizer):
    SVI(whole_rows, new_guide(), optimizer, Trace_ELBO()).step(X)


# fmt: off
FAMILIES = {
    "stick_the_landing: string": (lambda: DiagonalNormal("no"), TypeError,
        "DiagonalNormal: stick_the_landing must be True or False, got 'no'"),
    "stick_the_landing: 1": (lambda: FullRankNormal(stick_the_landing=1), TypeError,
        "FullRankNormal: stick_the_landing must be True or False, got 1"),
    "rank: 0": (lambda: LowRankNormal(0), ValueError, "LowRankNormal: rank must be at least 1, got 0"),
    "rank: -1": (lambda: LowRankNormal(-1), ValueError, "LowRankNormal: rank must be at least 1, got -1"),
    "rank: 1.5": (lambda: LowRankNormal(1.5), TypeError, "LowRankNormal: rank must be an int, got 1.5"),
    "rank: bool": (lambda: LowRankNormal(True), TypeError, "LowRankNormal: rank must be an int, got True"),
    "rank: string": (lambda: LowRankNormal("1"), TypeError, "LowRankNormal: rank must be an int, got '1'"),
    "components: 0": (lambda: NormalMixture(0), ValueError, "NormalMixture: components must be at least 1"),
    "components: 2.5": (lambda: NormalMixture(2.5), TypeError, "components must be an int, got 2.5"),
    "components: string": (lambda: NormalMixture("2"), TypeError, "components must be an int, got '2'"),
    "covariance": (lambda: NormalMixture(2, "tied"), ValueError, "covariance must be one of ... 'tied'"),
    "baseline": (lambda: NormalMixture(2, baseline="best"), ValueError, "baseline must be one of ... 'best'"),
    "spread: 0": (lambda: NormalMixture(2, spread=0.0), ValueError, "spread must be a positive number"),
    "spread: NaN": (lambda: NormalMixture(2, spread=NAN), ValueError, "spread must be a positive number"),
    "spread: string": (lambda: NormalMixture(2, spread="wide"), TypeError, "spread must be a number"),
    "learn_weights": (lambda: NormalMixture(2, learn_weights="no"), TypeError,
        "learn_weights must be True or False"),
    "stratified: 1": (lambda: NormalMixture(2, stratified=1), TypeError, "stratified must be True or False"),
    "stratified: equal weights": (lambda: NormalMixture(2, stratified=True, learn_weights=False), ValueError,
        "nothing to stratify"),
    "transforms: 0": (lambda: NormalizingFlow(0), ValueError,
        "NormalizingFlow: transforms must be at least 1, got 0 ... FullRankNormal()"),
    "kind": (lambda: NormalizingFlow(kind="cubic"), ValueError, "kind must be one of ... 'cubic'"),
    "hidden: number": (lambda: NormalizingFlow(hidden=3), TypeError, "hidden must be a sequence ... 3"),
    "hidden: 0": (lambda: NormalizingFlow(hidden=(0,)), ValueError, "hidden must be at least 1, got 0"),
    "hidden: none": (lambda: NormalizingFlow(hidden=()), ValueError, "hidden must name at least one layer"),
    "bins": (lambda: NormalizingFlow(bins=1), ValueError, "bins must be at least 2, got 1"),
    "context_size": (lambda: NormalizingFlow(context_size=0), ValueError, "context_size must be at least 1"),
    "base: string": (lambda: NormalizingFlow(base="x"), TypeError, "base must be a normal family ... 'x'"),
    "base: mixture": (lambda: NormalizingFlow(base=NormalMixture(2)), TypeError,
        "base must be a normal family ... NormalMixture"),
    "base: class": (lambda: NormalizingFlow(base=FullRankNormal), TypeError, "base must be a normal family"),
    "flow, landing": (lambda: NormalizingFlow(stick_the_landing="x"), TypeError, "stick_the_landing must be"),
    "zuko: string": (lambda: ZukoFlow("NSF"), TypeError, "ZukoFlow: build must be a function ... 'NSF'"),
    "zuko: no flow": (lambda: new_guide(family=zuko())(X), TypeError,
        "build(2, 64) returned int, expected a module"),
    "zuko: context_size": (lambda: zuko(context_size=0), ValueError,
        "context_size must be at least 1, got 0"),
    "zuko: base": (lambda: zuko(base=3), TypeError, "ZukoFlow: base must be a normal family ... 3"),
    "enumerate": (lambda: Discrete("x"), ValueError, "Discrete: enumerate must be one of ... 'x'"),
    "enumerate: bool": (lambda: Discrete(enumerate=True), ValueError, "enumerate must be one of ... True"),
    "discrete, baseline": (lambda: Discrete(baseline="x"), ValueError, "baseline must be one of ... 'x'"),
}
ENCODERS = {
    "MLP, width: 0": (lambda: MLP(0), ValueError, "MLP: width must be at least 1, got 0"),
    "MLP, width: string": (lambda: MLP("wide"), TypeError, "MLP: width must be an int, got 'wide'"),
    "MLP, width: 8.0": (lambda: MLP(8.0), TypeError, "MLP: width must be an int, got 8.0"),
    "MLP, depth": (lambda: MLP(depth=-1), ValueError, "MLP: depth must not be negative, got -1"),
    "MLP, missing": (lambda: MLP(missing="no"), TypeError, "MLP: missing must be True or False, got 'no'"),
    "DeepSet, width": (lambda: DeepSet(0), ValueError, "DeepSet: width must be at least 1, got 0"),
    "DeepSet, depth": (lambda: DeepSet(8, -1), ValueError, "DeepSet: depth must not be negative, got -1"),
    "DeepSet, missing": (lambda: DeepSet(missing=3), TypeError, "DeepSet: missing must be True or False"),
    "DeepSet: rows": (lambda: DeepSet(8)(X, INDEX, 3), ValueError, "DeepSet ... (8, 3) ... (4,)"),
    "SetTransformer, width": (lambda: SetTransformer(0), ValueError, "width must be at least 1, got 0"),
    "SetTransformer, heads: 0": (lambda: SetTransformer(8, 0), ValueError, "heads must be at least 1, got 0"),
    "SetTransformer, heads: 3": (lambda: SetTransformer(8, 3), ValueError,
        "width must be a multiple of heads, got width=8 and heads=3"),
    "SetTransformer, seeds": (lambda: SetTransformer(seeds=0), ValueError, "seeds must be at least 1, got 0"),
    "SetTransformer, inducing": (lambda: SetTransformer(inducing=0), ValueError, "inducing must be at least"),
    "SetTransformer, blocks": (lambda: SetTransformer(blocks=-1), ValueError, "blocks must not be negative"),
    "SetTransformer, missing": (lambda: SetTransformer(missing="x"), TypeError, "missing must be True or"),
    "SetTransformer, inducing: 2.5": (lambda: SetTransformer(inducing=2.5), TypeError,
        "SetTransformer: inducing must be an int, got 2.5"),
    "GRUEncoder, width": (lambda: GRUEncoder(0), ValueError, "GRUEncoder: width must be at least 1, got 0"),
    "GRUEncoder, layers": (lambda: GRUEncoder(layers=0), ValueError, "GRUEncoder: layers must be at least 1"),
    "GRUEncoder, causal": (lambda: GRUEncoder(causal="x"), TypeError,
        "causal must be True or False, got 'x'"),
    "GRUEncoder: rank": (lambda: GRUEncoder(8)(X[:, 0]), ValueError,
        "expected sequences (B, T, ...), got (8,)"),
    "GRUEncoder: lengths": (lambda: GRUEncoder(8)(torch.zeros(3, 4, 2), torch.tensor([5, 1, 1])), ValueError,
        "lengths must lie between 0 and 4 ... 1 to 5"),
    "Standardize, missing": (lambda: Standardize(missing="x"), TypeError,
        "Standardize: missing must be True"),
}
OPTIMIZERS = {
    "arguments": (lambda: optim.Adam(3), TypeError, "optim_args must be a dict or a function ... 3"),
    "clip": (lambda: optim.Adam({}, "x"), TypeError, "clip_args must be a dict or a function ... 'x'"),
    "schedule": (lambda: optim.Adam({}, schedule=3), TypeError, "schedule must be a function ... 3"),
    "schedule: nothing": (lambda: step(optim.Adam({"lr": 0.1}, schedule=lambda t: None)), TypeError,
        "schedule must return a number, got None at step 0"),
    "constructor": (lambda: optim.FusedOptim(3, {}), TypeError, "optim_constructor must be a class ... 3"),
    "rate": (lambda: step(optim.Adam({"lr": -1.0})), ValueError, "Invalid learning rate: -1.0"),
    "option": (lambda: step(optim.Adam({"rate": 1.0})), TypeError, "unexpected keyword argument 'rate'"),
    "clip option": (lambda: step(optim.Adam({}, {"norm": 3})), TypeError, "keyword argument 'norm'"),
}
# fmt: on
CASES = [*table("family", FAMILIES), *table("encoder", ENCODERS), *table("optimizer", OPTIMIZERS)]
