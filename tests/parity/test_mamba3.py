"""Mamba-3 against its equations token by token in float64, and without rotation against Mamba-2.

Their package has no CPU path and does not install here.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from seqzoo.kernels.decay import decay
from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context
from tests.tolerances import LAW_EXACT, relative_error

D = 16
SIZES = [
    {"d_state": 8, "head_dim": 8},
    {"d_state": 7, "head_dim": 8, "n_groups": 2, "rope_fraction": 1.0},
    {"d_state": 10, "head_dim": 32},
]


def build(**options: object) -> nn.Module:
    mixer = create_mixer("mamba3", D, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        mixer.dt_bias += 2  # steps long enough for decays and angles to matter
    return mixer


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def published(mixer: nn.Module, u: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One row, one head and one token after the other: (T, D) and the state after them."""
    H, N, G, R = mixer.heads, mixer.d_state, mixer.n_groups, mixer.pairs
    sizes = [mixer.inner, mixer.inner, G * N, G * N, H, H, H, R]
    parts = torch.split(u @ mixer.in_proj.weight.T, sizes, dim=-1)
    z, x, B, C, dt, a, trapezoid, theta = parts
    outputs, last = [], []
    for head in range(H):
        group = head // (H // G)
        columns = slice(head * mixer.inner // H, (head + 1) * mixer.inner // H)
        angle = torch.zeros(R).double()
        S = torch.zeros(N, mixer.inner // H).double()
        k_before, x_before, y = torch.zeros(N).double(), torch.zeros(len(S[0])).double(), []
        for t in range(len(u)):
            step = softplus(dt[t, head] + mixer.dt_bias[head])
            A = torch.clamp(-softplus(a[t, head]), max=-1e-4)
            mix = torch.sigmoid(trapezoid[t, head])
            alpha = torch.exp(A * step)
            beta, gamma = (1 - mix) * step * alpha, mix * step
            angle = angle + step * math.pi * torch.tanh(theta[t])
            states = slice(group * N, (group + 1) * N)
            k = turned(normed(B[t, states], mixer.B_norm) + mixer.B_bias[head], angle)
            q = turned(normed(C[t, states], mixer.C_norm) + mixer.C_bias[head], angle)
            value = x[t, columns]
            S = alpha * S + beta * torch.outer(k_before, x_before) + gamma * torch.outer(k, value)
            y.append((S.T @ q + mixer.D[head] * value) * silu(z[t, columns]))
            k_before, x_before = k, value
        outputs.append(torch.stack(y))
        last.append((angle % (2 * math.pi), S, k_before, x_before))
    state = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
    return torch.cat(outputs, dim=-1) @ mixer.out_proj.weight.T, state


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Neighbours as complex numbers, those that have an angle times e^(i angle)."""
    x = x.clone()
    for pair, phi in enumerate(angle):
        z = torch.complex(x[2 * pair], x[2 * pair + 1]) * torch.polar(torch.ones_like(phi), phi)
        x[2 * pair], x[2 * pair + 1] = z.real, z.imag
    return x


@torch.no_grad()
@pytest.mark.parametrize("options", SIZES, ids=str)
def test_equals_the_papers_recurrence_in_outputs_and_state(options):
    mixer, u = build(**options), torch.randn(2, 40, D).double()
    y, state = mixer(u, mixer.init_state(2))
    for row in range(2):
        wanted, last = published(mixer, u[row])
        assert relative_error(y[row], wanted) <= LAW_EXACT
        for found, true in zip(state, last, strict=True):
            assert relative_error(found[row], true) <= LAW_EXACT


@torch.no_grad()
def test_documents_and_masked_tokens_are_the_recurrence_of_what_is_there():
    mixer, u = build(**SIZES[1]), torch.randn(1, 30, D).double()
    mask = torch.rand(1, 30) < 0.6
    document = (torch.arange(30) >= 11).long()[None]
    y, state = mixer(u, mixer.init_state(1), Context(mask=mask, document=document))
    for part in (slice(0, 11), slice(11, 30)):
        real = mask[0, part]
        wanted, last = published(mixer, u[0, part][real])
        assert relative_error(y[0, part][real], wanted) <= LAW_EXACT
    for found, true in zip(state, last, strict=True):
        assert relative_error(found[0], true) <= LAW_EXACT


@torch.no_grad()
def test_without_rotation_and_without_the_earlier_token_it_is_the_state_space_of_mamba2():
    mixer, u = build(**SIZES[0]), torch.randn(2, 50, D).double()
    u[..., 0] = 1  # what stands in for a bias of the projection
    H, N, E = mixer.heads, mixer.d_state, mixer.inner
    sizes = [E, E, N, N, H, H, H, mixer.pairs]
    *_, trapezoid, theta = mixer.in_proj.weight.split(sizes)
    trapezoid.zero_()[:, 0] = 50  # its sigmoid is 1
    theta.zero_()
    z, x, B, C, dt, a, _, _ = torch.split(u @ mixer.in_proj.weight.T, sizes, dim=-1)
    k = normed(B, mixer.B_norm)[:, :, None] + mixer.B_bias
    q = normed(C, mixer.C_norm)[:, :, None] + mixer.C_bias
    dt, x = softplus(dt + mixer.dt_bias), x.unflatten(-1, (H, -1))
    o, S = decay(q, k, dt[..., None] * x, -dt * softplus(a), backend="reference")
    o = (o + mixer.D[:, None] * x).flatten(-2) * silu(z)
    y, state = mixer(u, mixer.init_state(2))
    assert relative_error(y, o @ mixer.out_proj.weight.T) <= LAW_EXACT
    assert relative_error(state.S, S) <= LAW_EXACT


@torch.no_grad()
def test_angles_stay_exact_over_long_sequences():
    mixer = create_mixer("mamba3", D, head_dim=8, d_state=8)
    mixer.dt_bias += 3
    u = torch.randn(1, 20_000, D)
    found = mixer(u, mixer.init_state(1))[1].angle
    wanted = mixer.double()(u.double(), mixer.init_state(1))[1].angle
    # what is left is the rounding of each token's own step, not of the sum
    apart = (found - wanted + math.pi) % (2 * math.pi) - math.pi
    assert apart.abs().max() <= 2e-4


def test_initial_values_are_the_published_ones():
    mixer = create_mixer("mamba3", 2048, head_dim=4, d_state=4)
    dt = softplus(mixer.dt_bias)
    assert 0.00099 <= dt.min() < 0.0011 < 0.09 < dt.max() <= 0.1001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.1  # log-uniform: the geometric mean
    for p in (mixer.B_bias, mixer.C_bias, mixer.B_norm, mixer.C_norm, mixer.D):
        assert (p == 1).all()


def test_wrong_sizes_are_refused_by_name():
    for options, words in (
        ({"head_dim": 24}, r"model=32 is not divisible by head_dim=24; nearest: 24, 48"),
        ({"head_dim": 8, "n_groups": 3}, r"=4 is not divisible by n_groups=3; nearest: 3, 6"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 is not allowed"),
        ({"d_state": 3}, "must leave 2 of d_state=3 states to turn"),
    ):
        with pytest.raises(ValueError, match=words):
            create_mixer("mamba3", D, **options)
