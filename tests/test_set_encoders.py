"""Encoders of sets: what they may depend on, what they must not, and what they learn."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from pyro_guides.encoders import MLP, DeepSet, SetEncoder, SetTransformer
from pyro_guides.encoders.attention import _Attention

NAN = float("nan")
SIZES = [3, 0, 1, 7, 0, 12]
INDEX = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))[torch.randperm(sum(SIZES))]

ENCODERS = {
    "deep set": lambda **options: DeepSet(width=8, depth=2, **options),
    "linear deep set": lambda **options: DeepSet(width=8, depth=0, **options),
    "set transformer": lambda **options: SetTransformer(8, heads=2, seeds=3, inducing=5, **options),
    "two blocks": lambda **options: SetTransformer(8, 2, 1, 5, 2, **options),
    "no blocks": lambda **options: SetTransformer(8, 2, 3, 5, 0, **options),
}


@pytest.fixture(params=ENCODERS)
def make(request):
    return ENCODERS[request.param]


def elements(*shape, dtype=torch.float64):
    return 2.0 * torch.randn(len(INDEX), *shape, dtype=dtype) + 1.0


def shaken(encoder, *args):
    """The encoder, built and with all its weights away from where they start."""
    encoder(*args)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_contexts_have_the_shape_and_dtype_they_should(make, shape, dtype):
    encoder, x = make(), elements(*shape, dtype=dtype)
    assert isinstance(encoder, SetEncoder)
    assert list(encoder.parameters()) == []
    context = encoder(x, INDEX, 8)
    assert (context.shape, context.dtype) == ((8, 8), dtype)
    assert {p.dtype for p in encoder.parameters()} == {dtype}
    assert encoder(x[:0], INDEX[:0], 0).shape == (0, 8)


def test_order_of_elements_does_not_matter(make):
    x = elements(3)
    encoder, order = shaken(make(), x, INDEX, 6), torch.randperm(len(x))
    expected = encoder(x, INDEX, 6)
    assert gap(encoder(x[order], INDEX[order], 6), expected) < 1e-12
    assert gap(encoder(x[order], INDEX, 6), expected) > 1e-3  # control: which set they belong to does


def test_sets_do_not_see_each_other(make):
    x = elements(3)
    encoder = shaken(make(), x, INDEX, 6)
    together = encoder(x, INDEX, 6)
    for s in range(6):
        own = x[INDEX.eq(s)]
        alone = encoder(own, torch.zeros(len(own), dtype=torch.long), 1)
        assert gap(alone[0], together[s]) < 1e-12
    swapped = encoder(x, 5 - INDEX, 6).flip(0)
    assert gap(swapped, together) < 1e-12


def test_empty_sets_share_a_learned_context(make):
    x = elements(3)
    encoder = shaken(make(), x, INDEX, 6)
    context = encoder(x, INDEX, 8)
    empty = encoder(x[:0], INDEX[:0], 2)
    assert context.isfinite().all()
    for row in (context[4], context[6], context[7], *empty):
        assert gap(row, context[1]) < 1e-12
    assert gap(context[2], context[1]) > 1e-3
    empty.square().sum().backward()
    moved = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in moved)
    assert any(g.abs().max() > 0 for g in moved)


def test_a_set_twice_is_another_set(make):
    x = elements(3)
    encoder = shaken(make(), x, INDEX, 6)
    twice = encoder(torch.cat([x, x]), torch.cat([INDEX, INDEX]), 6)
    gaps = (twice - encoder(x, INDEX, 6)).abs().amax(-1)
    full = torch.tensor(SIZES) > 0
    assert (gaps[full] > 1e-3).all()
    assert (gaps[~full] < 1e-12).all()


def test_gradients_are_those_of_finite_differences(make):
    x = elements(2)[:6].requires_grad_()
    index = torch.tensor([0, 2, 2, 0, 2, 3])
    encoder = shaken(make(), x, index, 4)
    weights = torch.randn(4, 8, dtype=torch.float64)
    parameters = list(encoder.parameters())

    def scalar(x, *_):
        return (encoder(x, index, 4) * weights).sum()

    assert torch.autograd.gradcheck(scalar, (x, *parameters), fast_mode=True)
    gradients = torch.autograd.grad(scalar(x), [x, *parameters])
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0].abs().amax(-1) > 0).all()


def test_large_scores_overflow_nothing():
    attention = _Attention(4, 2, 2)
    with torch.no_grad():
        attention.queries.mul_(1e4)
    features, index = torch.randn(30, 4).requires_grad_(), torch.arange(30) % 5
    means, precisions = attention(features, index, 6)
    assert means.isfinite().all()
    assert precisions.isfinite().all()
    assert precisions.max() > 100.0
    assert (means[5] == 0).all()
    assert (precisions[5] == 0).all()
    (gradient,) = torch.autograd.grad(means.sum() + precisions.sum(), features)
    assert gradient.isfinite().all()


def test_attention_is_the_formula():
    attention = _Attention(4, 3, 2, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    means, precisions = attention(x, torch.zeros(5, dtype=torch.long), 1)
    keys, values = attention.keys(attention.norm(x)), attention.values(x)
    for q in range(3):
        for h, part in enumerate([slice(0, 2), slice(2, 4)]):
            weights = (keys[:, part] @ attention.queries[q, h] / math.sqrt(2)).exp()
            nothing = attention.log_weight_of_nothing[q, h].exp()
            mean = weights @ values[:, part] / (nothing + weights.sum())
            torch.testing.assert_close(means[0, q, part], mean)
            torch.testing.assert_close(precisions[0, q, h], (1 + weights.sum() / nothing).log())


def test_missing_values(make):
    x = elements(3)
    x[0, 1] = NAN
    encoder = shaken(make(missing=True), x, INDEX, 6)
    context = encoder(x, INDEX, 6)
    assert context.isfinite().all()
    filled = x.clone()
    filled[0, 1] = encoder.elements.standardize.mean[1]
    changed = (encoder(filled, INDEX, 6) - context).abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [INDEX[0].item()]  # the mean is not a missing value
    strict = make()
    assert strict(x, INDEX, 6)[INDEX[0]].isnan().any()  # control: without missing= it stays


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_state_loads_into_unbuilt_and_built(make, built, nested):
    def wrapped():
        return nn.ModuleDict({"a": make()})["a"] if nested else make()

    x = elements(3)
    source, target = shaken(wrapped(), x, INDEX, 6), wrapped()
    expected = source(x, INDEX, 6)
    if built:
        assert gap(target(x + 1.0, INDEX, 6), expected) > 1e-3
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x, INDEX, 6), expected)
    copied = copy.deepcopy(source)
    assert torch.equal(copied(x, INDEX, 6), expected)
    with torch.no_grad():
        next(copied.parameters()).add_(1.0)
    assert torch.equal(source(x, INDEX, 6), expected)
    assert gap(copied(x, INDEX, 6), expected) > 1e-3


# --- errors


def test_index_that_does_not_fit(make):
    encoder, x = make(), elements(3)
    cases = [
        (x, INDEX[:-1], 6, r"expected elements \(M, ...\) and an index .*\(23, 3\).* shape \(22,\)"),
        (x, INDEX.unsqueeze(1), 6, r"shape \(23, 1\)"),
        (x, INDEX.double(), 6, r"torch.int64 .* got .* torch.float64"),
        (x.sum(), INDEX, 6, r"got \(\)"),
        (x, INDEX, 5, r"between 0 and 4, as there are 5 sets, got 0 to 5"),
        (x, INDEX - 1, 6, r"between 0 and 5, .* got -1 to 4"),
        (x[:0], INDEX[:0], 6, r"first call needs at least one element, got \(0, 3\)"),
    ]
    for values, index, count, message in cases:
        with pytest.raises(ValueError, match=message):
            encoder(values, index, count)
    assert list(encoder.parameters()) == []
    encoder(x, INDEX, 6)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DeepSet, {"width": 0}, "DeepSet: width must be at least 1, got 0"),
        (DeepSet, {"depth": -1}, "DeepSet: depth must not be negative, got -1"),
        (SetTransformer, {"width": 0}, "SetTransformer: width must be at least 1, got 0"),
        (SetTransformer, {"heads": 0}, "SetTransformer: heads must be at least 1, got 0"),
        (SetTransformer, {"seeds": 0}, "SetTransformer: seeds must be at least 1, got 0"),
        (SetTransformer, {"inducing": -2}, "SetTransformer: inducing must be at least 1, got -2"),
        (SetTransformer, {"blocks": -1}, "SetTransformer: blocks must not be negative, got -1"),
        (SetTransformer, {"width": 10, "heads": 4}, "multiple of heads, got width=10 and heads=4"),
    ],
)
def test_bad_sizes(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_set_encoder_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SetEncoder()


# --- learning


class MeanPooling(nn.Module):
    """A control: the same networks, but nothing counts the elements."""

    def __init__(self):
        super().__init__()
        self.elements, self.mix = MLP(32, 1), MLP(32, 1)

    def forward(self, x, index, count):
        features = self.elements(x)
        sums = features.new_zeros(count, 32).index_add(0, index, features)
        sizes = torch.bincount(index, minlength=count).clamp(min=1)
        return self.mix(sums / sizes.unsqueeze(-1))


def groups(count, largest):
    """Groups of a normal mean z ~ N(0, 1) with unit noise, and the exact posterior."""
    sizes = torch.randint(0, largest + 1, (count,))
    index = torch.repeat_interleave(torch.arange(count), sizes)
    x = torch.randn(count)[index] + torch.randn(len(index))
    mean = torch.zeros(count).index_add(0, index, x) / (sizes + 1)
    return x.unsqueeze(-1), index, mean, (sizes + 1.0).rsqrt()


def error_after_training(encoder, steps, rate=2e-2):
    """Root mean square errors of posterior means, in sds, and of their log sds, in new groups."""
    encoder(*groups(500, 40)[:2], 500)
    head = nn.Linear(32, 2)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def errors():
        x, index, mean, sd = groups(64 if encoder.training else 2000, 40)
        loc, log_scale = head(encoder(x, index, len(mean))).unbind(-1)
        return ((loc - mean) / sd).square().mean(), (log_scale - sd.log()).square().mean()

    for _ in range(steps):
        optimizer.zero_grad()
        sum(errors()).backward()
        optimizer.step()
        schedule.step()
    encoder.eval()
    with torch.no_grad():
        return np.sqrt([e.item() for e in errors()])


def test_learns_the_posterior_of_a_group_mean():
    of_mean, of_log_sd = error_after_training(DeepSet(32, 0), 800)
    assert of_mean < 0.05
    assert of_log_sd < 0.02


@pytest.mark.slow
def test_attention_learns_the_posterior_of_a_group_mean():
    of_mean, of_log_sd = error_after_training(SetTransformer(32, 4, 4, 4, 0), 300)
    assert of_mean < 0.1
    assert of_log_sd < 0.05


def test_learns_no_posterior_without_a_count():
    of_mean, of_log_sd = error_after_training(MeanPooling(), 400)
    assert of_mean > 0.15
    assert of_log_sd > 0.2
