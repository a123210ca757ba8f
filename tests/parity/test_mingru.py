"""minGRU against the paper's log-space form where candidates are positive, else its plain loop."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from seqzoo.layers.mingru import MinGRU


def build(**options: object) -> MinGRU:
    return MinGRU(6, **options).double()


def parts(mixer: MinGRU, x: Tensor) -> tuple[Tensor, Tensor]:
    bias = 0 if mixer.in_proj.bias is None else mixer.in_proj.bias
    return (x @ mixer.in_proj.weight.T + bias).chunk(2, dim=-1)


def projected(mixer: MinGRU, h: Tensor) -> Tensor:
    y = h @ mixer.down_proj.weight.T
    return y if mixer.down_proj.bias is None else y + mixer.down_proj.bias


def log_space(mixer: MinGRU, x: Tensor) -> Tensor:
    """Appendix B: h_t = exp(A_t + logcumsumexp(log(z c) - A)), A the sum of log(1 - z)."""
    gate, candidate = parts(mixer, x)
    log_candidate = torch.where(
        candidate >= 0, torch.log(candidate.clamp(min=0) + 0.5), -softplus(-candidate)
    )
    kept = -softplus(gate).cumsum(1)
    h = torch.exp(kept + torch.logcumsumexp(-softplus(-gate) + log_candidate - kept, dim=1))
    return projected(mixer, h)


@pytest.mark.parametrize("options", [{}, {"expand": 1.5, "bias": False}], ids=str)
@torch.no_grad()
def test_positive_candidates_equal_the_log_space_form(options):
    mixer, x = build(**options), 2 * torch.randn(2, 50, 6, dtype=torch.float64)
    wanted = log_space(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted)


@torch.no_grad()
def test_linear_candidates_equal_the_loop_of_section_3():
    mixer, x = build(candidate="linear", expand=0.5), torch.randn(2, 30, 6, dtype=torch.float64)
    gate, candidate = parts(mixer, x)
    h, z = torch.zeros(2, 3, dtype=torch.float64), torch.sigmoid(gate)
    for t in range(30):
        h = (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
    torch.testing.assert_close(mixer(x)[0][:, -1], projected(mixer, h))


@torch.no_grad()
def test_a_gate_that_is_almost_open_keeps_its_digits():
    mixer = MinGRU(1, expand=1, bias=False)
    mixer.in_proj.weight.copy_(torch.tensor([[20.0], [0.0]]))
    mixer.down_proj.weight.fill_(1.0)
    state = type(mixer.init_state(1))(torch.full((1, 1), 1e9))
    _, after = mixer(torch.ones(1, 1, 1), state)
    wanted = 1e9 * torch.sigmoid(torch.tensor(-20.0).double()) + 0.5
    torch.testing.assert_close(after.h[0, 0].double(), wanted, rtol=1e-6, atol=0)


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"candidate": "tanh"}, r"no candidate of mingru named 'tanh'"),
        ({"expand": 0.0}, r"expand=0.0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            MinGRU(4, **options)
