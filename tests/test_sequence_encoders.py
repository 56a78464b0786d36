"""Encoders of sequences: what a step's context may depend on, what it must not, and what it can hold."""

import copy

import pytest
import torch
from torch import nn

from pyro_guides.encoders import GRUEncoder, SequenceEncoder

NAN = float("nan")
LENGTHS = torch.tensor([9, 4, 0, 1, 7])

ENCODERS = {
    "both ways": lambda **options: GRUEncoder(6, **options),
    "causal": lambda **options: GRUEncoder(6, causal=True, **options),
    "odd width": lambda **options: GRUEncoder(5, **options),
    "two layers": lambda **options: GRUEncoder(6, layers=2, **options),
}


@pytest.fixture(params=ENCODERS)
def make(request):
    return ENCODERS[request.param]


def sequences(*shape, steps=9, dtype=torch.float64):
    return 3.0 * torch.randn(len(LENGTHS), steps, *shape, dtype=dtype) - 1.0


def shaken(encoder, x, lengths=LENGTHS):
    """The encoder, built and with all its weights away from where they start."""
    encoder.summary(encoder(x, lengths), lengths)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def gap(a, b):
    return (a - b).abs().max().item()


def padding(lengths=LENGTHS, steps=9):
    return torch.arange(steps) >= lengths.unsqueeze(-1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_contexts_have_the_shape_and_dtype_they_should(make, shape, dtype):
    encoder, x = make(), sequences(*shape, dtype=dtype)
    assert isinstance(encoder, SequenceEncoder)
    assert list(encoder.parameters()) == []
    contexts = encoder(x, LENGTHS)
    summary = encoder.summary(contexts, LENGTHS)
    width = encoder.steps.width
    assert (contexts.shape, contexts.dtype) == ((5, 9, width), dtype)
    assert (summary.shape, summary.dtype) == ((5, width), dtype)
    assert {p.dtype for p in encoder.parameters()} == {dtype}
    assert (contexts[padding()] == 0).all()
    assert (contexts[~padding()].abs().amax(-1) > 0).all()
    assert encoder(x[:0]).shape == (0, 9, width)
    assert (encoder(x, 0 * LENGTHS) == 0).all()


def test_no_lengths_are_full_lengths(make):
    x = sequences(3)
    encoder, full = shaken(make(), x), torch.full((5,), 9)
    contexts = encoder(x)
    assert torch.equal(contexts, encoder(x, full))
    assert torch.equal(encoder.summary(contexts), encoder.summary(contexts, full))
    assert not torch.equal(contexts, encoder(x, LENGTHS))


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e3, 0.0])
def test_padding_is_never_read(make, value):
    x = sequences(3)
    encoder = shaken(make(), x)
    expected = encoder(x, LENGTHS)
    other = x.clone()
    other[padding()] = value
    longer = torch.cat([other, torch.full((5, 6, 3), value, dtype=x.dtype)], dim=1)
    contexts, long = encoder(other, LENGTHS), encoder(longer, LENGTHS)
    assert torch.equal(contexts, expected)
    assert torch.equal(long[:, :9], expected)
    assert (long[:, 9:] == 0).all()
    summary = encoder.summary(expected, LENGTHS)
    torch.testing.assert_close(encoder.summary(long, LENGTHS), summary, rtol=1e-12, atol=1e-12)
    assert gap(encoder(other, LENGTHS.clamp(max=6)), expected) > 1e-3  # control: lengths matter


@pytest.mark.parametrize("value", [NAN, 1e3])
def test_padding_counts_in_no_statistics_and_gradients(make, value):
    x = sequences(3)
    x[padding()] = value
    x.requires_grad_()
    encoder = make()
    contexts = encoder(x, LENGTHS)
    valid = x.detach()[~padding()]
    torch.testing.assert_close(encoder.steps.standardize.mean, valid.mean(0))
    (encoder.summary(contexts, LENGTHS).square().sum() + contexts.square().sum()).backward()
    assert (x.grad[padding()] == 0).all()
    assert (x.grad[~padding()].abs().amax(-1) > 0).all()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)


def test_sequences_do_not_see_each_other(make):
    x = sequences(3)
    encoder = shaken(make(), x)
    together = encoder(x, LENGTHS)
    summaries = encoder.summary(together, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = encoder(x[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(alone[0], together[row, :length], rtol=1e-12, atol=1e-12)
        if length:
            summary = encoder.summary(alone)
            torch.testing.assert_close(summary[0], summaries[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_only_causal_contexts_ignore_the_future(causal, layers):
    x = sequences(3)
    encoder, full = GRUEncoder(6, causal=causal, layers=layers), torch.full((5,), 9)
    shaken(encoder, x, full)
    changed = x.clone()
    changed[:, 5:] += 10.0
    before, after = encoder(x), encoder(changed)
    assert torch.equal(before[:, :5], after[:, :5]) == causal
    assert gap(before[:, 5], after[:, 5]) > 1e-3
    if not causal:
        assert ((before[:, :5] - after[:, :5]).abs().amax(-1) > 1e-6).all()


def test_every_context_sees_the_past_and_the_summary_all(make):
    x = sequences(3)
    encoder, full = make(), torch.full((5,), 9)
    shaken(encoder, x, full)
    for step in (0, 4, 8):
        changed = x.clone()
        changed[:, step] += 5.0
        before, after = encoder(x), encoder(changed)
        assert ((before - after)[:, step:].abs().amax(-1) > 1e-9).all()
        assert ((encoder.summary(before) - encoder.summary(after)).abs().amax(-1) > 1e-4).all()


def test_summary_depends_on_length():
    x = torch.ones(2, 9, 3, dtype=torch.float64)
    encoder = shaken(GRUEncoder(6), sequences(3))
    lengths = torch.tensor([9, 4])
    longer, shorter = encoder.summary(encoder(x, lengths), lengths)
    assert gap(longer, shorter) > 1e-3


def test_gradients_are_those_of_finite_differences(make):
    x, lengths = sequences(2)[:3, :4].requires_grad_(), torch.tensor([4, 0, 2])
    encoder = shaken(make(), x, lengths)
    parameters = list(encoder.parameters())

    def outputs(x, *_):
        contexts = encoder(x, lengths)
        return contexts, encoder.summary(contexts, lengths)

    assert torch.autograd.gradcheck(outputs, (x, *parameters), fast_mode=True)


def test_missing_values(make):
    x = sequences(3)
    x[0, 2, 1] = NAN
    encoder = shaken(make(missing=True), x)
    contexts = encoder(x, LENGTHS)
    assert contexts.isfinite().all()
    filled = x.clone()
    filled[0, 2, 1] = encoder.steps.standardize.mean[1]
    gaps = (encoder(filled, LENGTHS) - contexts).abs().amax(-1)
    assert gaps[0, 2] > 1e-3  # the mean is not a missing value
    assert (gaps[1:] == 0).all()
    assert make()(x, LENGTHS)[0, 2].isnan().any()  # control: without missing= it stays


@pytest.mark.parametrize("built", [False, True])
def test_state_loads_into_unbuilt_and_built(make, built):
    x = sequences(3)
    source, target = shaken(make(), x), make()
    expected = source(x, LENGTHS)
    summary = source.summary(expected, LENGTHS)
    if built:
        contexts = target(x + 1.0, LENGTHS)
        assert gap(target.summary(contexts, LENGTHS), summary) > 1e-3
    target.load_state_dict(source.state_dict())
    copied = copy.deepcopy(source)
    for encoder in (target, copied):
        assert torch.equal(encoder(x, LENGTHS), expected)
        assert torch.equal(encoder.summary(expected, LENGTHS), summary)
    with torch.no_grad():
        next(copied.parameters()).add_(1.0)
    assert torch.equal(source(x, LENGTHS), expected)
    assert gap(copied(x, LENGTHS), expected) > 1e-3


def test_lengths_that_do_not_fit(make):
    encoder, x = make(), sequences(3)
    cases = [
        (x, LENGTHS[:-1], r"shape \(5,\) for sequences \(5, 9, 3\), got torch.int64 and shape \(4,\)"),
        (x, LENGTHS.double(), r"got torch.float64 and shape \(5,\)"),
        (x, LENGTHS + 1, r"between 0 and 9, .* got 1 to 10"),
        (x, LENGTHS - 1, r"between 0 and 9, .* got -1 to 8"),
        (x[0, :, 0], LENGTHS, r"expected sequences \(B, T, ...\), got \(9,\)"),
        (x, 0 * LENGTHS, r"first call needs at least one step, got \(5, 9, 3\)"),
    ]
    for values, lengths, message in cases:
        with pytest.raises(ValueError, match=message):
            encoder(values, lengths)
    assert list(encoder.parameters()) == []
    contexts = encoder(x, LENGTHS)
    with pytest.raises(ValueError, match="between 0 and 9"):
        encoder.summary(contexts, LENGTHS + 1)


@pytest.mark.parametrize("options", [{"width": 0}, {"layers": 0}])
def test_bad_sizes(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"GRUEncoder: {name} must be at least 1, got 0"):
        GRUEncoder(**options)


def test_sequence_encoder_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SequenceEncoder()


def test_learns_the_sum_of_all_only_where_it_can():
    """The first step's context tells the sum of all steps if it sees the future."""

    def error(causal):
        encoder, head = GRUEncoder(16, causal=causal), nn.Linear(16, 1)
        encoder(torch.randn(64, 8, 1))
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 2e-2)
        for _ in range(70):
            x = torch.randn(64, 8, 1)
            loss = (head(encoder(x)[:, 0]) - x.sum(1)).square().mean() / 8
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert error(causal=False) < 0.05
    assert error(causal=True) > 0.5
