"""Bad arguments of bounds and schedules."""

from pyro.infer import Trace_ELBO

from pyro_guides.objectives import (
    IWELBO,
    CyclicalWarmup,
    ForwardKL,
    FreeBits,
    LinearWarmup,
    WeightedSum,
    differentiable_loss,
    kl_weight,
)

from .case import table
from .models import INF, NAN, X, guide, whole_rows

ELBO = Trace_ELBO()

# fmt: off
BOUNDS = {
    "IWELBO: 0": (lambda: IWELBO(0), ValueError, "num_particles must be at least 1 ... 0"),
    "IWELBO: string": (lambda: IWELBO("8"), TypeError, "num_particles must be an int, got '8'"),
    "IWELBO: 2.5": (lambda: IWELBO(2.5), TypeError, "num_particles must be an int, got 2.5"),
    "IWELBO, wake": (lambda: IWELBO(1, gradient="wake"), ValueError,
        "at least 2 with gradient='wake', got 1"),
    "IWELBO, gradient": (lambda: IWELBO(3, gradient="x"), ValueError, "gradient must be one of ... 'x'"),
    "IWELBO, plates: string": (lambda: IWELBO(3, plates="data"), TypeError, "list of names ... ['data']"),
    "IWELBO, plates: number": (lambda: IWELBO(3, plates=3), TypeError,
        "plates must be a list of names ... 3"),
    "IWELBO, plates: unknown": (lambda: IWELBO(3, plates=["q"]).loss(whole_rows, guide(), X), ValueError,
        "names ['q'], but the plates are ['data']"),
    "IWELBO, nesting: string": (lambda: IWELBO(3, max_plate_nesting="1"), TypeError,
        "max_plate_nesting must be an int, got '1'"),
    "IWELBO, nesting: -1": (lambda: IWELBO(3, max_plate_nesting=-1), ValueError,
        "max_plate_nesting must not be negative, got -1"),
    "ForwardKL: 0": (lambda: ForwardKL(0), ValueError, "num_simulations must be at least 1, got 0"),
    "ForwardKL: string": (lambda: ForwardKL("1"), TypeError, "num_simulations must be an int, got '1'"),
    "WeightedSum: none": (WeightedSum, ValueError, "WeightedSum needs at least one pair (elbo, weight)"),
    "WeightedSum: no pair": (lambda: WeightedSum(ELBO), TypeError, "each term must be a pair (elbo, weight)"),
    "WeightedSum: class": (lambda: WeightedSum((Trace_ELBO, 1.0)), TypeError, "must begin with an ELBO"),
    "WeightedSum: string": (lambda: WeightedSum((ELBO, "1")), TypeError, "a weight must be a number ... '1'"),
    "WeightedSum: NaN": (lambda: WeightedSum((ELBO, NAN)), ValueError,
        "a weight must be ... finite, got nan"),
    "WeightedSum: -1": (lambda: WeightedSum((ELBO, -1.0)), ValueError,
        "a weight must be at least 0 ... -1.0"),
    "loss: string": (lambda: differentiable_loss("e", whole_rows, guide(), X), TypeError,
        "elbo must be an ELBO such as Trace_ELBO(), got 'e'"),
    "loss: class": (lambda: differentiable_loss(Trace_ELBO, whole_rows, guide(), X), TypeError,
        "elbo must be an object, got the class Trace_ELBO; write Trace_ELBO()"),
    "loss, model": (lambda: differentiable_loss(ELBO, None, guide(), X), TypeError,
        "model must be a function or module, got a NoneType"),
    "loss, guide": (lambda: differentiable_loss(ELBO, whole_rows, None, X), TypeError,
        "guide must be a function or module, got a NoneType"),
}
SCHEDULES = {
    "linear, steps: 0": (lambda: LinearWarmup(0), ValueError, "steps must be at least 1, got 0"),
    "linear, steps: string": (lambda: LinearWarmup("9"), TypeError, "steps must be an int, got '9'"),
    "linear, start: 2": (lambda: LinearWarmup(3, start=2.0), ValueError,
        "start must be in [0.0, 1.0] ... 2.0"),
    "linear, start: NaN": (lambda: LinearWarmup(3, start=NAN), ValueError, "start must be ... nan"),
    "linear, start: string": (lambda: LinearWarmup(3, start="0"), TypeError,
        "start must be a number, got '0'"),
    "linear, only: string": (lambda: LinearWarmup(3, only="z"), TypeError, "only must be a list of names"),
    "cyclical, period": (lambda: CyclicalWarmup(0), ValueError, "period must be at least 1, got 0"),
    "cyclical, ramp: 0": (lambda: CyclicalWarmup(3, ramp=0.0), ValueError, "ramp must be above 0, got 0"),
    "cyclical, ramp: 2": (lambda: CyclicalWarmup(3, ramp=2.0), ValueError, "ramp must be in ... 2.0"),
    "cyclical, cycles: 0": (lambda: CyclicalWarmup(3, cycles=0), ValueError,
        "cycles must be at least 1, got 0"),
    "cyclical, cycles: 1.5": (lambda: CyclicalWarmup(3, cycles=1.5), TypeError,
        "cycles must be an int, got 1.5"),
    "bits, nats: -1": (lambda: FreeBits(-1.0), ValueError, "nats must be at least 0.0 ... -1.0"),
    "bits, nats: NaN": (lambda: FreeBits(NAN), ValueError, "nats must be ... nan"),
    "bits, nats: string": (lambda: FreeBits("1"), TypeError, "nats must be a number, got '1'"),
    "bits, decay: 1": (lambda: FreeBits(1.0, decay=1.0), ValueError, "decay must be below 1, got 1"),
    "bits, decay: -1": (lambda: FreeBits(1.0, decay=-1.0), ValueError, "decay must be in ... -1.0"),
    "bits, only: number": (lambda: FreeBits(1.0, only=3), TypeError,
        "only must be a list of names ... got 3"),
    "bits, only: numbers": (lambda: FreeBits(1.0, only=[3]), TypeError,
        "only must be a list of names ... [3]"),
    "weight: -1": (lambda: kl_weight(-1.0), ValueError, "weight must be at least 0.0 and finite, got -1.0"),
    "weight: inf": (lambda: kl_weight(INF), ValueError, "weight must be at least 0.0 and finite, got inf"),
    "weight: string": (lambda: kl_weight("a"), TypeError, "weight must be a number, got 'a'"),
    "weight: -1 inside": (lambda: kl_weight({"z": -1.0}), ValueError, "weight must be ... -1.0"),
    "weight: string inside": (lambda: kl_weight({"z": "a"}), TypeError, "weight must be a number, got 'a'"),
    "weight: empty": (lambda: kl_weight({}), ValueError,
        "weight names no latents ... a dict that is not empty"),
}
# fmt: on
CASES = [*table("bound", BOUNDS), *table("schedule", SCHEDULES)]
