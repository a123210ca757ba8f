"""Hyena against the paper's equations with explicit sums in float64 (arXiv:2302.10866)."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from seqzoo.layers.base import Context
from seqzoo.layers.hyena import Hyena


def build(**options) -> Hyena:
    small = {"max_length": 40, "filter_order": 8, "n_bands": 3, "frequency": 2.0, "shift": 0.02}
    return Hyena(4, **(small | options)).double()


def published_filters(mixer: Hyena) -> Tensor:
    """(N - 1, D, max_length): sine network of t, Re and Im exp(-i f w), times the window."""
    L, D = mixer.max_length, mixer.d_model
    rows = []
    for slot in range(L):
        t, w = slot / (L - 1), 2 * math.pi * slot / L
        bands = torch.linspace(1e-4, mixer.n_bands - 1, mixer.n_bands, dtype=torch.float64)
        turns = [cmath.exp(-1j * f * w) for f in bands.tolist()]
        features = [t, *(z.real for z in turns), *(z.imag for z in turns)]
        h = torch.tensor(features, dtype=torch.float64)
        for weight, bias in zip(mixer.filter_weights, mixer.filter_biases, strict=False):
            h = torch.sin(mixer.frequency * (weight @ h + bias))
        h = mixer.filter_weights[-1] @ h
        decays = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, len(h)).double()
        rows.append(h * (torch.exp(-decays * t) + mixer.shift))
    return torch.stack(rows, dim=-1).reshape(mixer.order - 1, D, L)


def published(mixer: Hyena, x: Tensor) -> Tensor:
    _, T, D = x.shape
    z = x @ mixer.in_proj.weight.T + mixer.in_proj.bias
    mixed = torch.zeros_like(z) + mixer.conv_bias
    for t in range(T):
        for j in range(min(3, t + 1)):
            mixed[:, t] += mixer.conv_weight[:, 2 - j] * z[:, t - j]
    *gates, v = mixed.split(D, dim=-1)
    filters = published_filters(mixer)
    for n in range(mixer.order - 1):
        v = v * gates[mixer.order - 1 - n]
        sums = mixer.skip[n] * v
        for t in range(T):
            for s in range(t + 1):
                sums[:, t] += filters[n, :, t - s] * v[:, s]
        v = sums
    return (gates[0] * v) @ mixer.out_proj.weight.T + mixer.out_proj.bias


@pytest.mark.parametrize("order", [2, 3])
@torch.no_grad()
def test_equals_the_explicit_sums(order):
    mixer, x = build(order=order), torch.randn(2, 40, 4).double()
    torch.testing.assert_close(mixer(x)[0], published(mixer, x))


@torch.no_grad()
def test_filters_belong_to_positions_not_to_the_length_at_hand():
    mixer = build()
    whole = mixer.filters(40, torch.float64)
    torch.testing.assert_close(mixer.filters(7, torch.float64), whole[..., :7])
    torch.testing.assert_close(whole, published_filters(mixer))


@torch.no_grad()
def test_windows_never_fall_below_shift():
    mixer = build(fast_decay=0.01, slow_decay=0.01, shift=0.3)
    unshifted = build(fast_decay=0.01, slow_decay=0.01, shift=0.0)
    unshifted.load_state_dict(mixer.state_dict())
    tail, bare = (m.filters(40, torch.float64)[..., 20:] for m in (mixer, unshifted))
    assert bare.abs().max() < 1e-9
    assert tail.abs().max() > 0.01


@torch.no_grad()
def test_neither_short_nor_long_convolution_crosses_documents():
    mixer, x = build(), torch.randn(2, 30, 4).double()
    lengths = (11, 1, 18)
    ids = torch.repeat_interleave(torch.tensor([7, 2, 7]), torch.tensor(lengths)).expand(2, -1)
    packed = mixer(x, None, Context(document=ids))[0]
    separate = torch.cat([published(mixer, d) for d in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate)


def test_half_precision_parameters_do_not_blur_positions():
    mixer = Hyena(4).to(torch.bfloat16)
    filters = mixer.filters(2000, torch.float32)
    exact = Hyena(4).double()
    exact.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(filters, exact.filters(2000, torch.float64).float())
    assert (filters.diff(dim=-1) != 0).float().mean() > 0.9


def test_longer_sequences_than_the_filters_are_refused_by_both_numbers():
    mixer = build()
    with pytest.raises(ValueError, match=r"41 tokens do not fit the filters of max_length=40"):
        mixer(torch.randn(1, 41, 4).double())
    state = mixer(torch.randn(1, 40, 4).double(), mixer.init_state(1))[1]
    with pytest.raises(ValueError, match=r"41 tokens do not fit the filters of max_length=40"):
        mixer(torch.randn(1, 1, 4).double(), state)


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"order": 1}, r"order=1 is not allowed; it must be at least 2"),
        ({"max_length": 1}, r"max_length=1 is not allowed; it must be at least 2"),
        ({"filter_layers": -1}, r"filter_layers=-1 is not allowed"),
        ({"slow_decay": 0.0}, r"slow_decay=0.0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            Hyena(4, **options)
