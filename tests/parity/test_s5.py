"""S5 against its dense system of conjugate pairs in float64, discretised as matrices."""

import math

import pytest
import torch
from torch import Tensor

from seqzoo.layers.s5 import S5, _hippo_n


def build(**options: object) -> S5:
    return S5(5, **({"d_state": 8, "dt_min": 0.05, "dt_max": 0.5} | options)).double()


def dense_system(mixer: S5) -> tuple[Tensor, Tensor, Tensor]:
    """(A', B', C) of all P states, each beside its conjugate."""
    A = torch.complex(mixer.A_real.clamp(max=-1e-4), mixer.A_imag)
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C)
    A, B = torch.cat([A, A.conj()]), torch.cat([B, B.conj()])
    C, dt = torch.cat([C, C.conj()], dim=1), torch.exp(mixer.log_dt).repeat(2)[:, None]
    P, D = B.shape
    scaled, one = dt * torch.diag(A), torch.eye(P, dtype=A.dtype)
    if mixer.discretisation == "zoh":  # the exact flow of x' = A x + B u under a held u
        flow = torch.zeros(P + D, P + D, dtype=A.dtype)
        flow[:P, :P], flow[:P, P:] = scaled, dt * B
        flow = torch.matrix_exp(flow)
        return flow[:P, :P], flow[:P, P:], C
    inverse = torch.linalg.inv(one - scaled / 2)
    return inverse @ (one + scaled / 2), inverse @ (dt * B), C


def published(mixer: S5, x: Tensor) -> Tensor:
    """Recurrence, skip, GELU, and the weighted sigmoid gate."""
    A, B, C = dense_system(mixer)
    h, outputs = torch.zeros(x.shape[0], A.shape[0], dtype=A.dtype), []
    for t in range(x.shape[1]):
        h = h @ A.T + x[:, t].to(A.dtype) @ B.T
        y = h @ C.T
        assert y.imag.abs().max() < 1e-12  # pairs cancel
        outputs.append(y.real + mixer.skip * x[:, t])
    y = torch.stack(outputs, dim=1)
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y * torch.sigmoid(y @ mixer.gate_proj.weight.T + mixer.gate_proj.bias)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@torch.no_grad()
def test_one_pass_and_single_steps_equal_the_dense_recurrence(discretisation):
    mixer = build(discretisation=discretisation)
    x = torch.randn(2, 40, 5, dtype=torch.float64)
    wanted = published(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted)


@torch.no_grad()
def test_eigenvalues_that_wander_right_are_held_left_of_zero():
    mixer, x = build(), torch.randn(1, 300, 5, dtype=torch.float64)
    mixer.A_real[:2] = 0.5
    torch.testing.assert_close(mixer(x)[0], published(mixer, x))


def test_the_spectrum_starts_as_that_of_every_hippo_n_block():
    n = torch.arange(6).double()
    hippo = -torch.sqrt((2 * n[:, None] + 1) * (2 * n + 1)).tril(-1) - torch.diag(n + 1)
    root = torch.sqrt(n + 0.5)
    normal = (hippo + root[:, None] * root).to(torch.complex128)
    values, vectors = _hippo_n(6)
    assert (values.imag > 0).all()
    torch.testing.assert_close(normal @ vectors, vectors * values)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(3, dtype=torch.complex128))
    mixer = S5(4, d_state=18, n_blocks=3)
    started = torch.complex(mixer.A_real, mixer.A_imag)
    torch.testing.assert_close(started, values.to(started.dtype).repeat(3))


@torch.no_grad()
def test_maps_start_as_lecun_draws_seen_from_the_eigenvectors():
    mixer = S5(3000, d_state=24, n_blocks=2)
    V = _hippo_n(12)[1].to(torch.complex64)
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C)
    drawn = 2 * torch.cat([(V @ part).real for part in B.split(6)])  # real before they were turned
    assert abs(drawn.std() * math.sqrt(24) - 1) < 0.02
    assert drawn.abs().max() * math.sqrt(24) < 2.4  # cut at two deviations of the uncut normal
    assert abs(C.abs().square().mean() * 24 / 2 - 1) < 0.02
    rebuilt = torch.cat([V.mH @ part for part in drawn.to(V.dtype).split(12)])
    torch.testing.assert_close(rebuilt, B, rtol=1e-4, atol=1e-5)


def test_steps_start_log_uniform_between_their_bounds():
    log_dt = S5(2, d_state=8000, n_blocks=1000, dt_min=0.002, dt_max=0.05).log_dt
    low, high = math.log(0.002), math.log(0.05)
    assert low <= log_dt.min() < low + 0.02
    assert high - 0.02 < log_dt.max() <= high
    assert abs(log_dt.mean() - (low + high) / 2) < 0.05


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"d_state": 30, "n_blocks": 4}, r"d_state=30 is not divisible by 2 \* n_blocks=8"),
        ({"discretisation": "euler"}, r"no discretisation of s5 named 'euler'"),
        ({"dt_min": 0.2}, r"dt_max=0.1 is not allowed; it must be at least dt_min=0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            S5(4, **options)
