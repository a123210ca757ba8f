"""DSS against the paper's equations, term by term in float64 (arXiv:2203.14343)."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from seqzoo.layers.dss import DSS
from tests.tolerances import relative_error


def build(**options) -> DSS:
    small = {"d_state": 3, "max_length": 50, "dt_min": 0.05, "dt_max": 0.5}
    mixer = DSS(4, **(small | options)).double()
    with torch.no_grad():
        mixer.A_imag.add_(0.3 * torch.randn_like(mixer.A_imag))
        if mixer.version == "softmax":  # falling, nearly level, and growing towards the far end
            mixer.A_real.copy_(torch.tensor([-0.7, -1e-3, 0.4]))
        else:
            mixer.log_A_real.add_(0.3 * torch.randn_like(mixer.log_A_real))
    return mixer


def published_kernel(mixer: DSS, length: int) -> Tensor:
    """(D, length), each softmax as a plain quotient."""
    softmax = mixer.version == "softmax"
    real = mixer.A_real if softmax else -mixer.log_A_real.exp()
    kernel = torch.zeros(mixer.d_model, length, dtype=torch.float64)
    for d in range(mixer.d_model):
        dt = math.exp(mixer.log_dt[d].item())
        for n in range(mixer.d_state):
            a = complex(real[n].item(), mixer.A_imag[n].item())
            w = complex(*mixer.W[d, n].tolist())
            terms = [cmath.exp(a * dt * step) for step in range(length)]
            scale = 1 / sum(terms[: mixer.max_length]) if softmax else cmath.exp(a * dt) - 1
            part = [(w / a * scale * term).real for term in terms]
            kernel[d] += torch.tensor(part, dtype=torch.float64)
    return kernel


def published(mixer: DSS, x: Tensor) -> Tensor:
    """Explicit convolution, skip, GELU, linear map."""
    T = x.shape[1]
    kernel = published_kernel(mixer, mixer.max_length)
    y = mixer.skip * x
    for t in range(T):
        for s in range(t + 1):
            y[:, t] += kernel[:, t - s] * x[:, s]
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return y @ mixer.out_proj.weight.T + mixer.out_proj.bias


@pytest.mark.parametrize("version", ["exp", "softmax"])
@torch.no_grad()
def test_both_modes_equal_the_papers_convolution(version):
    mixer, x = build(version=version), torch.randn(2, 50, 4).double()
    wanted = published(mixer, x)
    # The safe reciprocal of the softmax bends it by 1e-7.
    bound = {"rtol": 1e-6, "atol": 1e-6} if version == "softmax" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(mixer(x)[0], wanted, **bound)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, **bound)


@torch.no_grad()
def test_softmax_sums_to_one_over_max_length_whichever_way_it_leans():
    mixer = build(version="softmax")
    a = torch.complex(mixer.A_real, mixer.A_imag)
    mixer.W.copy_(torch.view_as_real(a.expand(4, 3)))  # so that W / A is 1
    kernel = mixer._system().kernel(50, torch.zeros(1).double())
    torch.testing.assert_close(kernel.sum(1), torch.full((4,), 3.0).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("real", [-50.0, 0.0, 50.0])
def test_extreme_eigenvalues_neither_overflow_nor_divide_by_zero(real):
    mixer, x = DSS(4, version="softmax", max_length=4000), torch.randn(1, 4000, 4)
    with torch.no_grad():
        mixer.A_real.fill_(real)
        mixer.A_imag[0] = 0.0
    y, state = mixer(x, mixer.init_state(1))
    (y.sum() + state[0].sum()).backward()
    assert y.isfinite().all()
    for name, p in mixer.named_parameters():
        assert p.grad.isfinite().all(), name
    cut, carried = mixer(x[:, :1000], mixer.init_state(1))
    rest = mixer(x[:, 1000:], carried)[0]
    assert relative_error(torch.cat([cut, rest], dim=1), y) <= 1e-4


def test_growing_terms_have_the_gradient_of_a_finite_difference():
    mixer = build(version="softmax")
    like = torch.zeros(1).double()
    weight = torch.randn(4, 50).double()

    def loss() -> Tensor:
        return (mixer._system().kernel(50, like) * weight).sum()

    (grad,) = torch.autograd.grad(loss(), mixer.A_real)
    with torch.no_grad():
        for n in range(3):
            mixer.A_real[n] += 1e-6
            above = loss()
            mixer.A_real[n] -= 2e-6
            below = loss()
            mixer.A_real[n] += 1e-6
            torch.testing.assert_close(grad[n], (above - below) / 2e-6, rtol=1e-5, atol=1e-6)


def test_initial_eigenvalues_are_those_of_the_paper():
    N = 4
    n = torch.arange(2 * N).double()
    root = torch.sqrt(n + 0.5)
    hippo = -torch.sqrt((2 * n[:, None] + 1) * (2 * n + 1)).tril(-1) - torch.diag(n + 1)
    spectrum = torch.linalg.eigvals(hippo + root[:, None] * root)
    mixer = DSS(3, d_state=N)
    wanted = spectrum.imag[spectrum.imag > 0].sort().values
    torch.testing.assert_close(mixer.A_imag.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(mixer.log_A_real.exp(), torch.full((N,), 0.5))
    torch.testing.assert_close(DSS(3, d_state=N, init="lin").A_imag, math.pi * torch.arange(N))


def test_slowly_trained_parameters_are_all_but_the_maps():
    for version in ("exp", "softmax"):
        mixer = DSS(4, version=version)
        rest = {name for name, _ in mixer.named_parameters()} - set(mixer.ssm_parameters)
        assert rest == {"skip", "out_proj.weight", "out_proj.bias"}


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"version": "clip"}, r"no version of dss named 'clip'"),
        ({"init": "hippo"}, r"no init of dss named 'hippo'"),
        ({"max_length": 1}, r"max_length=1 is not allowed; it must be at least 2"),
        ({"dt_min": 0.2}, r"dt_max=0.1 is not allowed; it must be at least dt_min=0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            DSS(4, **options)
