"""The LRU against the sum that its recurrence stands for, in float64; no package has it."""

import math

import pytest
import torch
from torch import Tensor

from seqzoo.layers.lru import LRU


def build(d_model: int, **options: float) -> LRU:
    mixer = LRU(d_model, **options).double()
    with torch.no_grad():
        mixer.gamma_log.add_(torch.randn_like(mixer.gamma_log))  # learned apart from lambda
    return mixer


def published(mixer: LRU, x: Tensor) -> Tensor:
    """y_t = Re(sum_s C lambda^(t-s) gamma B u_s) + D u_t, then GELU and GLU."""
    size, angle = torch.exp(-torch.exp(mixer.nu_log)), torch.exp(mixer.theta_log)
    lag = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    power = torch.where(lag[..., None] >= 0, size ** lag[..., None].clamp(min=0), 0)
    power = torch.polar(power, angle * lag[..., None])
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C)
    normed = torch.exp(mixer.gamma_log)[:, None] * B
    y = torch.einsum("dn,tsn,ne,bse->btd", C, power, normed, x.to(C.dtype)).real + mixer.skip * x
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    value, gate = (y @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(2, dim=-1)
    return value * torch.sigmoid(gate)


@pytest.mark.parametrize("options", [{}, {"d_state": 9, "r_min": 0.9, "r_max": 0.999}], ids=str)
@torch.no_grad()
def test_one_pass_and_single_steps_equal_the_closed_form(options):
    mixer, x = build(6, **options), torch.randn(2, 40, 6, dtype=torch.float64)
    wanted = published(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted)


def test_eigenvalues_start_uniform_on_the_ring_and_inputs_normalised():
    mixer = LRU(8, d_state=4000, r_min=0.6, r_max=0.9, max_phase=1.5)
    square = torch.exp(-2 * torch.exp(mixer.nu_log))
    assert 0.36 <= square.min() < 0.361
    assert 0.809 < square.max() <= 0.8101
    assert abs(square.mean() - (0.36 + 0.81) / 2) < 0.01  # uniform by area
    angle = torch.exp(mixer.theta_log)
    assert angle.max() <= 1.5
    assert abs(angle.mean() - 0.75) < 0.03
    torch.testing.assert_close(torch.exp(2 * mixer.gamma_log), 1 - square)


def test_maps_start_with_the_published_variances():
    mixer = LRU(300, d_state=200)
    assert abs(mixer.B.std() * math.sqrt(2 * 300) - 1) < 0.02
    assert abs(mixer.C.std() * math.sqrt(200) - 1) < 0.02
    assert abs(mixer.skip.std() - 1) < 0.15


def test_the_whole_disc_starts_without_infinities():
    for _ in range(20):
        for p in LRU(4, d_state=1000).parameters():
            assert p.isfinite().all()


@torch.no_grad()
def test_angles_keep_their_digits_over_thousands_of_steps():
    mixer = LRU(4, d_state=8, r_min=0.9995, r_max=0.9999, max_phase=6.28)
    x = torch.randn(1, 4000, 4)
    wanted = mixer.double()(x.double())[0]
    found = mixer.float()(x)[0]
    assert (found - wanted).norm() / wanted.norm() < 1e-4


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"r_min": 0.9, "r_max": 0.8}, r"r_min=0.9, r_max=0.8: allowed is 0 <= r_min < r_max <= 1"),
        ({"r_max": 1.1}, r"r_max=1.1"),
        ({"d_state": 0}, r"d_state=0 is not allowed"),
        ({"max_phase": 0.0}, r"max_phase=0.0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            LRU(4, **options)
