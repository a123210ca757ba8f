"""S4D against the paper's equations, written densely in float64 (arXiv:2206.11893)."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context
from seqzoo.layers.linear_system import response
from seqzoo.layers.s4d import S4D, S4DState
from tests.tolerances import relative_error


def build(dtype: torch.dtype = torch.float64, **options) -> S4D:
    mixer = S4D(4, **({"d_state": 6, "dt_min": 0.05, "dt_max": 0.5} | options)).to(dtype)
    with torch.no_grad():
        mixer.log_A_real.add_(0.3 * torch.randn_like(mixer.log_A_real))
    return mixer


def dense_systems(mixer: S4D) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(A', B', C) of each channel with real states (Re h_n, Im h_n), discretised as matrices."""
    systems = []
    for d in range(mixer.d_model):
        A, C = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        B = torch.tensor([1.0, 0.0] * 3, dtype=torch.float64)[:, None]
        for n in range(3):
            a, b = -mixer.log_A_real[d, n].exp(), mixer.A_imag[d, n]
            i = 2 * n
            A[i, i], A[i, i + 1], A[i + 1, i], A[i + 1, i + 1] = a, -b, b, a
            C[i], C[i + 1] = (
                2 * mixer.C[d, n, 0],
                -2 * mixer.C[d, n, 1],
            )  # 2 Re((c + i c')(h + i h'))
        dt, one = mixer.log_dt[d].exp(), torch.eye(6, dtype=torch.float64)
        if mixer.discretisation == "zoh":  # the exact flow of x' = A x + B u under a held u
            flow = torch.zeros(7, 7, dtype=torch.float64)
            flow[:6, :6], flow[:6, 6:] = A, B
            flow = torch.matrix_exp(dt * flow)
            systems.append((flow[:6, :6], flow[:6, 6], C))
        else:
            inverse = torch.linalg.inv(one - dt / 2 * A)
            systems.append((inverse @ (one + dt / 2 * A), (inverse @ (dt * B))[:, 0], C))
    return systems


def published(mixer: S4D, x: Tensor) -> Tensor:
    """Recurrence, skip, GELU, linear map, GLU."""
    channels = []
    for d, (A, B, C) in enumerate(dense_systems(mixer)):
        h, outputs = torch.zeros(x.shape[0], 6, dtype=torch.float64), []
        for t in range(x.shape[1]):
            h = h @ A.T + x[:, t, d, None] * B
            outputs.append(h @ C + mixer.skip[d] * x[:, t, d])
        channels.append(torch.stack(outputs, dim=1))
    y = torch.stack(channels, dim=-1)
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    y = y @ mixer.out_proj.weight.T + mixer.out_proj.bias
    return y[..., :4] * torch.sigmoid(y[..., 4:])


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
@torch.no_grad()
def test_both_modes_equal_the_dense_recurrence(init, discretisation):
    mixer, x = build(init=init, discretisation=discretisation), torch.randn(2, 90, 4).double()
    wanted = published(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@torch.no_grad()
def test_kernel_is_the_impulse_response(discretisation):
    mixer = build(discretisation=discretisation)
    log_a, b, c = mixer._system()
    dt = mixer.log_dt.exp()[:, None]
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    if discretisation == "zoh":
        a_bar, b_bar = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        a_bar, b_bar = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    torch.testing.assert_close(log_a.exp(), a_bar)
    torch.testing.assert_close(b, b_bar)
    impulse = torch.zeros(1, 40, 4, dtype=torch.float64)
    impulse[:, 0] = 1
    heard = []
    mixer.skip.zero_()
    mixer.out_proj.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    mixer(impulse)
    response = torch.stack([2 * (c * b_bar * a_bar**step).real.sum(1) for step in range(40)])
    torch.testing.assert_close(heard[0][0], torch.nn.functional.gelu(response))


def test_initial_frequencies_are_those_of_the_paper():
    N = 8
    n = torch.arange(N).double()
    lower = -torch.sqrt((2 * n[:, None] + 1) * (2 * n + 1)).tril(-1)
    hippo = lower - torch.diag(n + 1)
    root = torch.sqrt(n + 0.5)
    spectrum = torch.linalg.eigvals(hippo + root[:, None] * root)
    torch.testing.assert_close(spectrum.real, torch.full((N,), -0.5, dtype=torch.float64))
    wanted = {
        "lin": [0, math.pi, 2 * math.pi, 3 * math.pi],
        "inv": [8 / math.pi * (8 / (2 * k + 1) - 1) for k in range(4)],
        "legs": spectrum.imag[spectrum.imag > 0].sort().values.tolist(),
    }
    for init, frequencies in wanted.items():
        mixer = S4D(3, d_state=N, init=init)
        torch.testing.assert_close(mixer.A_imag, torch.tensor(frequencies).expand(3, 4))
        torch.testing.assert_close(mixer.log_A_real, torch.full((3, 4), math.log(0.5)))


def test_steps_start_log_uniform_between_their_bounds():
    log_dt = S4D(4000, d_state=2, dt_min=0.002, dt_max=0.05).log_dt
    low, high = math.log(0.002), math.log(0.05)
    assert low <= log_dt.min() < low + 0.02
    assert high - 0.02 < log_dt.max() <= high
    assert abs(log_dt.mean() - (low + high) / 2) < 0.05


@pytest.mark.parametrize("last_document", [3, 8])
def test_long_passes_go_on_from_a_state_through_masks_and_documents_like_steps(last_document):
    mixer, x = build(), torch.randn(3, 150, 4, dtype=torch.float64)
    mask = torch.rand(3, 150) < 0.7
    mask[2] = False
    document = torch.repeat_interleave(torch.tensor([3, 5, 4]), torch.tensor([20, 90, 40]))
    document = torch.where(mask, document, 99)
    start = torch.randn_like(mixer.init_state(3)[0]).requires_grad_()
    last = torch.full((3,), last_document)

    def run(width: int) -> tuple[Tensor, ...]:
        state, outputs, before = S4DState(start), [], last
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

    for found, wanted in zip(run(150), run(1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_fast_oscillations_keep_their_digits_over_thousands_of_steps():
    exact = S4D(4, d_state=64, dt_min=0.05, dt_max=0.1)
    exact.log_A_real.fill_(-6.0)  # so that they are still heard
    log_a, b, c = exact._system()
    wanted = response(b * c, log_a, 8000, torch.zeros(1).double())
    found = response(b * c, log_a, 8000, torch.zeros(1))
    assert relative_error(found[:, -1000:], wanted[:, -1000:]) <= 1e-6
    naive = torch.exp(log_a.to(torch.complex64)[..., None] * torch.arange(7000, 8000))
    naive = torch.einsum("dn,dnl->dl", (b * c).to(torch.complex64), naive).real
    assert relative_error(naive, wanted[:, -1000:]) > 1e-4  # what this test would catch


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
    mixer, x = S4D(D, d_state=N), torch.randn(B, T, D)
    with Largest() as largest:
        y, state = mixer(x, mixer.init_state(B))
        (y.sum() + state[0].sum()).backward()
    assert largest.numel <= B * T * D * N // 16


def test_slowly_trained_parameters_exist():
    mixer = create_mixer("s4d", 4)
    names = dict(mixer.named_parameters())
    assert set(mixer.ssm_parameters) < set(names)


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"d_state": 5}, r"d_state=5 is odd; states come in pairs; nearest: 4, 6"),
        ({"init": "hippo"}, r"no init of s4d named 'hippo'"),
        ({"discretisation": "euler"}, r"no discretisation of s4d named 'euler'"),
        ({"dt_min": 0.2}, r"dt_max=0.1 is not allowed; it must be at least dt_min=0.2"),
        ({"dt_min": 0.0}, r"dt_min=0.0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            S4D(4, **options)
