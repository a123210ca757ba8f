"""MEGA against its equations as the authors' code has them, in float64 (arXiv:2209.10655)."""

import pytest
import torch
from torch import Tensor

from seqzoo.layers.base import Context
from seqzoo.layers.mega import Mega
from tests import properties
from tests.properties import Case


def build(**options) -> Mega:
    small = {"d_state": 3, "head_dim": 4, "hidden": 5, "chunk": 7}
    mixer = Mega(4, **(small | options)).double()
    with torch.no_grad():
        mixer.qk_scale.normal_()
        mixer.qk_bias.normal_()
    return mixer


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def published(mixer: Mega, x: Tensor) -> Tensor:
    """The layer as published, whose output holds (1 - u) x, minus the residual connection's x."""
    B, T, D = x.shape
    p, d = torch.sigmoid(mixer.alpha), torch.sigmoid(mixer.delta)
    h, averages = torch.zeros(B, D, mixer.d_state).double(), []
    for t in range(T):
        h = p * mixer.beta * x[:, t, :, None] + (1 - p * d) * h
        read = (h * mixer.gamma).sum(-1) / mixer.d_state**0.5
        averages.append(silu(read + mixer.omega * x[:, t]))
    m = torch.stack(averages, dim=1)
    base = m @ mixer.in_proj.weight.T + mixer.in_proj.bias
    u, z, r, hx = base.split([D, mixer.head_dim, mixer.hidden, D], dim=-1)
    u, z, r = torch.sigmoid(u), silu(z), silu(r)
    q, k = (z * mixer.qk_scale[i] + mixer.qk_bias[i] for i in (0, 1))
    v = silu(x @ mixer.v_proj.weight.T + mixer.v_proj.bias)
    o = torch.zeros_like(v)
    for t in range(T):
        first = 0 if mixer.chunk is None else t // mixer.chunk * mixer.chunk
        scores = (k[:, first : t + 1] @ q[:, t, :, None])[..., 0] / mixer.head_dim**0.5
        if "bias" in mixer.position.hooks:
            scores = scores + mixer.position.bias(t - torch.arange(first, t + 1)[None])[0, 0]
        weights = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
        o[:, t] = (weights[..., None] * v[:, first : t + 1]).sum(1)
    candidate = silu(hx + (o * r) @ mixer.o_proj.weight.T)
    return u * candidate + (1 - u) * x - x


@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("chunk", [7, None])
@torch.no_grad()
def test_one_pass_and_steps_equal_the_published_layer(chunk, position):
    mixer, x = build(chunk=chunk, position=position), torch.randn(2, 31, 4).double()
    wanted = published(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted, rtol=1e-9, atol=1e-10)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_a_state_holds_the_chunk_that_goes_on_and_nothing_else():
    mixer, x = build(), torch.randn(1, 31, 4).double()
    for length in (1, 6, 7, 8, 14, 31):
        state = mixer(x[:, :length], mixer.init_state(1))[1]
        assert int(state.mask.sum()) == length % 7
        assert not state.k[~state.mask].any()
    mask = torch.ones(1, 31, dtype=torch.bool)
    mask[0, 3:9] = False  # 25 real tokens
    state = mixer(x, mixer.init_state(1), Context(mask=mask))[1]
    assert int(state.mask.sum()) == 25 % 7
    document = (torch.arange(31) >= 10)[None].long()
    state = mixer(x, mixer.init_state(1), Context(document=document))[1]
    assert int(state.mask.sum()) == 21 % 7


@torch.no_grad()
def test_given_positions_do_not_move_the_borders_of_chunks():
    mixer, x = build(), torch.randn(2, 20, 4).double()
    positions = torch.arange(20).expand(2, -1) + 3
    found = mixer(x, None, Context(positions=positions))[0]
    torch.testing.assert_close(found, mixer(x)[0])
    first, state = mixer(x[:, :9], mixer.init_state(2), Context(positions=positions[:, :9]))
    second = mixer(x[:, 9:], state, Context(positions=positions[:, 9:]))[0]
    torch.testing.assert_close(torch.cat([first, second], dim=1), mixer(x)[0])


@pytest.mark.parametrize(
    "check", ["shapes", "causality", "prefix", "law", "padding", "packing", "truncation", "costs"]
)
def test_attention_without_chunks_keeps_the_contract(check):
    case = Case("mega", {"chunk": None, "position": "rope"})
    assert case.build().caps.state == "growing"
    getattr(properties, check)(case)


@torch.no_grad()
def test_averages_that_forget_at_once_stay_finite():
    mixer, x = build().float(), torch.randn(2, 100, 4)
    mixer.alpha.fill_(80.0)
    mixer.delta.fill_(80.0)
    assert mixer(x, mixer.init_state(2))[0].isfinite().all()


def test_start_is_that_of_the_authors():
    mixer = Mega(256, d_state=4)
    torch.testing.assert_close(
        mixer.beta.mean(0), torch.tensor([1.0, -1.0, 1.0, -1.0]), rtol=0, atol=0.01
    )
    assert 0.01 < mixer.beta[:, 0].std() < 0.03
    for p, std in ((mixer.alpha, 0.2), (mixer.delta, 0.2), (mixer.gamma, 1.0), (mixer.omega, 1.0)):
        assert 0.8 * std < p.std() < 1.2 * std
    assert mixer.qk_scale.std() < 0.03
    assert not mixer.qk_bias.any()


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"chunk": 1}, r"chunk=1 is not allowed; it must be at least 2"),
        ({"d_state": 0}, r"d_state=0 is not allowed"),
        ({"position": "sinusoidal"}, r"position 'sinusoidal' is added to the embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            Mega(4, **options)
