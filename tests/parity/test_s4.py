"""S4 against HiPPO's real matrices, discretised densely in float64 (arXiv:2111.00396)."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.layers.base import Context
from seqzoo.layers.s4 import S4, S4State
from tests.tolerances import relative_error

INITS = ("legs", "legt", "fourier")


def hippo(init: str, N: int) -> tuple[Tensor, Tensor]:
    """A and B of x' = A x + B u, entry by entry."""
    A, B = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for n in range(N):
        B[n] = math.sqrt(2 * n + 1)
        if init == "fourier":
            B[n] = 0 if n % 2 else (2 * math.sqrt(2) if n else 2)
    for n in range(N):
        for k in range(N):
            r = math.sqrt((2 * n + 1) * (2 * k + 1))
            if init == "legs":
                A[n, k] = -r if n > k else (-(n + 1) if n == k else 0)
            elif init == "legt":
                A[n, k] = -r if n >= k else -r * (-1) ** (k - n)
            else:  # cosines at even places, sines of the same frequency behind them
                A[n, k] = -B[n] * B[k] / 2
                if n == k + 1 and n % 2:
                    A[n, k] += 2 * math.pi * (k // 2)
                if k == n + 1 and k % 2:
                    A[n, k] -= 2 * math.pi * (n // 2)
    if init != "legs":  # the skew part starts this far inside
        A -= 1e-4 * torch.eye(N, dtype=torch.float64)
    return A, B


def dense_systems(mixer: S4, C: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(A', B', C) of each channel in HiPPO's own coordinates, by the bilinear rule."""
    A, B = hippo(mixer.init, mixer.d_state)
    one, systems = torch.eye(mixer.d_state, dtype=torch.float64), []
    for d in range(mixer.d_model):
        dt = mixer.log_dt[d].exp()
        inverse = torch.linalg.inv(one - dt / 2 * A)
        systems.append((inverse @ (one + dt / 2 * A), inverse @ (dt * B), C[d]))
    return systems


@torch.no_grad()
def build(init: str, N: int = 6, **options) -> tuple[S4, Tensor]:
    """A mixer in float64, and its C in HiPPO's coordinates."""
    mixer = S4(4, d_state=N, init=init, **({"dt_min": 0.05, "dt_max": 0.5} | options)).double()
    mixer.reset_parameters()  # again, for the digits
    C = torch.randn(4, N, dtype=torch.float64)
    A, B = hippo(init, N)
    if init == "fourier":
        V = torch.zeros(N, N // 2, dtype=torch.complex128)
        for k in range(N // 2):
            V[2 * k, k], V[2 * k + 1, k] = math.sqrt(0.5), -1j * math.sqrt(0.5)
    else:
        frequencies, V = torch.linalg.eigh(-0.5j * (A - A.mT))
        V = V[:, frequencies > 0]
        phase = (V.mH @ B.to(V.dtype)) / torch.view_as_complex(mixer.B[0])
        torch.testing.assert_close(phase.abs(), torch.ones(N // 2).double())
        V = V * phase  # eigenvectors have no phase of their own: that of the mixer
    mixer.C.copy_(torch.view_as_real(C.to(V.dtype) @ V))
    return mixer, C


def published(mixer: S4, C: Tensor, x: Tensor) -> Tensor:
    """Recurrence, skip, GELU, linear map, GLU."""
    channels = []
    for d, (A, B, c) in enumerate(dense_systems(mixer, C)):
        h, outputs = torch.zeros(x.shape[0], len(B), dtype=torch.float64), []
        for t in range(x.shape[1]):
            h = h @ A.T + x[:, t, d, None] * B
            outputs.append(h @ c + mixer.skip[d] * x[:, t, d])
        channels.append(torch.stack(outputs, dim=1))
    y = torch.stack(channels, dim=-1)
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    y = y @ mixer.out_proj.weight.T + mixer.out_proj.bias
    return y[..., :4] * torch.sigmoid(y[..., 4:])


@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_both_modes_equal_hippos_dense_recurrence(init):
    mixer, C = build(init)
    x = torch.randn(2, 150, 4).double()
    wanted = published(mixer, C, x)
    torch.testing.assert_close(mixer(x)[0], wanted, rtol=1e-9, atol=1e-9)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_sixty_four_states_keep_their_digits(init):
    mixer, C = build(init, N=64, dt_min=0.001, dt_max=0.1)
    length = 1000
    wanted = torch.zeros(4, length, dtype=torch.float64)
    for d, (A, B, c) in enumerate(dense_systems(mixer, C)):
        for step in range(length):
            wanted[d, step], B = c @ B, A @ B
    exact = mixer._dense(length).kernel(length, x := torch.zeros(1).double())
    assert relative_error(exact, wanted) <= 1e-9
    narrow = mixer.float()._dense(length).kernel(length, x.float())
    assert relative_error(narrow, wanted) <= 2e-5  # parameters are rounded, the system is not


def test_learned_systems_never_explode():
    mixer = S4(4, d_state=8).double()
    with torch.no_grad():
        for p in (mixer.P, mixer.B, mixer.A_imag, mixer.log_A_real, mixer.log_dt):
            p.copy_(3 * torch.randn_like(p))
    square = mixer._dense(4096).squares
    assert all(torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-12 for A in square)


@pytest.mark.parametrize("last_document", [3, 8])
def test_long_passes_go_on_from_a_state_through_masks_and_documents_like_steps(last_document):
    mixer, x = build("legt")[0], torch.randn(3, 150, 4, dtype=torch.float64)
    mask = torch.rand(3, 150) < 0.7
    mask[2] = False
    document = torch.repeat_interleave(torch.tensor([3, 5, 4]), torch.tensor([20, 90, 40]))
    document = torch.where(mask, document, 99)
    start = torch.randn_like(mixer.init_state(3)[0]).requires_grad_()
    last = torch.full((3,), last_document)

    def run(width: int) -> tuple[Tensor, ...]:
        state, outputs, before = S4State(start), [], last
        for first in range(0, 150, width):
            part = slice(first, first + width)
            real = mask[:, part]
            ctx = Context(mask=real, document=document[:, part], last_document=before)
            y, state = mixer(x[:, part], state, ctx)
            outputs.append(y)
            latest = torch.where(real, document[:, part], -1)
            for t in range(latest.shape[1]):
                before = torch.where(latest[:, t] >= 0, latest[:, t], before)
        y = torch.cat(outputs, dim=1)[mask]
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        loss = (weight * y).sum() + state[0].square().sum()
        return y, state[0], *torch.autograd.grad(loss, [start, *mixer.parameters()])

    for found, wanted in zip(run(150), run(10), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_holds_a_state_of_every_token():
    B, T, D, N = 2, 4096, 8, 64
    mixer, x = S4(D, d_state=N), torch.randn(B, T, D)
    with Largest() as largest:
        y, state = mixer(x, mixer.init_state(B))
        (y.sum() + state[0].sum()).backward()
    assert largest.numel <= B * T * D * N // 16


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"d_state": 5}, r"d_state=5 is odd; states come in pairs; nearest: 4, 6"),
        ({"init": "hippo"}, r"no init of s4 named 'hippo'"),
        ({"dt_min": 0.2}, r"dt_max=0.1 is not allowed; it must be at least dt_min=0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            S4(4, **options)
