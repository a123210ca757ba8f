"""H3 against the paper's equations, as two recurrences in float64 (arXiv:2212.14052)."""

import math

import pytest
import torch
from torch import Tensor

from seqzoo.layers.h3 import H3


def build(**options) -> H3:
    small = {"d_state": 6, "dt_min": 0.05, "dt_max": 0.5}
    mixer = H3(4, **(small | options)).double()
    with torch.no_grad():
        mixer.log_A_real.add_(0.3 * torch.randn_like(mixer.log_A_real))
    return mixer


def dense_system(mixer: H3, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A', B', C) of a head with real states (Re h_n, Im h_n), discretised as matrices."""
    A, C = torch.zeros(6, 6).double(), torch.zeros(6).double()
    B = torch.tensor([1.0, 0.0] * 3).double()[:, None]
    for n in range(3):
        a, b, i = -mixer.log_A_real[head, n].exp(), mixer.A_imag[head, n], 2 * n
        A[i, i], A[i, i + 1], A[i + 1, i], A[i + 1, i + 1] = a, -b, b, a
        C[i], C[i + 1] = 2 * mixer.C[head, n, 0], -2 * mixer.C[head, n, 1]
    dt, one = mixer.log_dt[head].exp(), torch.eye(6).double()
    if mixer.discretisation == "zoh":  # the exact flow of x' = A x + B u under a held u
        flow = torch.zeros(7, 7).double()
        flow[:6, :6], flow[:6, 6:] = A, B
        flow = torch.matrix_exp(dt * flow)
        return flow[:6, :6], flow[:6, 6], C
    inverse = torch.linalg.inv(one - dt / 2 * A)
    return inverse @ (one + dt / 2 * A), (inverse @ (dt * B))[:, 0], C


def published(mixer: H3, x: Tensor) -> Tensor:
    """Token by token: the shift model as a matrix, then k' v^T into a head's diagonal model."""
    B, T, D = x.shape
    P, S = mixer.head_dim, mixer.shift_taps.shape[1]
    q, k, v = (proj(x) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    shift, first = torch.diag(torch.ones(S - 1), -1).double(), torch.eye(S).double()[0]
    systems = [dense_system(mixer, head) for head in range(D // P)]
    memory = torch.zeros(B, D, S).double()
    h = torch.zeros(B, D // P, P, P, 6).double()
    outputs = torch.zeros_like(x)
    for t in range(T):
        memory = memory @ shift.T + k[:, t, :, None] * first
        keys = (memory * mixer.shift_taps).sum(-1) + mixer.shift_skip * k[:, t]
        for head, (a, b, c) in enumerate(systems):
            its = slice(head * P, (head + 1) * P)
            product = keys[:, its, None] * v[:, t, None, its]
            h[:, head] = h[:, head] @ a.T + product[..., None] * b
            read = h[:, head] @ c + mixer.skip[head] * product
            outputs[:, t, its] = (q[:, t, None, its] @ read)[:, 0]
    return mixer.o_proj(outputs)


@pytest.mark.parametrize("discretisation", ["bilinear", "zoh"])
@pytest.mark.parametrize("head_dim", [1, 2])
@torch.no_grad()
def test_both_modes_equal_the_two_recurrences(head_dim, discretisation):
    mixer = build(head_dim=head_dim, discretisation=discretisation, d_conv=5)
    x = torch.randn(2, 40, 4).double()
    wanted = published(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted, rtol=1e-9, atol=1e-10)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_shift_model_has_as_many_taps_as_states():
    mixer = build()
    assert mixer.shift_taps.shape == (4, 6)
    x = torch.randn(1, 30, 4).double()
    torch.testing.assert_close(mixer(x)[0], published(mixer, x), rtol=1e-9, atol=1e-10)


def test_start_is_that_of_the_authors():
    mixer = H3(512, d_state=8)
    torch.testing.assert_close(mixer.A_imag[3], math.pi * torch.arange(4))
    torch.testing.assert_close(mixer.log_A_real.exp(), torch.full((512, 4), 0.5))
    assert 0.99 * 8**-0.5 < mixer.shift_taps.abs().max() <= 8**-0.5
    assert abs(mixer.C.square().sum(-1).mean() - 1) < 0.1
    assert math.log(0.001) <= mixer.log_dt.min() < mixer.log_dt.max() <= math.log(0.1)
    assert set(mixer.ssm_parameters) < {name for name, _ in mixer.named_parameters()}


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"d_state": 5}, r"d_state=5 is odd; states come in pairs; nearest: 4, 6"),
        ({"head_dim": 3}, r"d_model=4 is not divisible by head_dim=3; nearest: 3, 6"),
        ({"init": "hippo"}, r"no init of h3 named 'hippo'"),
        ({"discretisation": "euler"}, r"no discretisation of h3 named 'euler'"),
        ({"dt_min": 0.2}, r"dt_max=0.1 is not allowed; it must be at least dt_min=0.2"),
        ({"d_conv": 0}, r"d_conv=0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            H3(4, **options)
