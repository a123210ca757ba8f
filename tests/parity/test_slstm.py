"""sLSTM against the paper's equations as they stand before they are stabilised, in float64."""

import pytest
import torch
from torch import Tensor

from seqzoo.layers.slstm import SLSTM


def build(**options: object) -> SLSTM:
    mixer = SLSTM(12, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


def dense(blocks: Tensor) -> Tensor:
    """(H, K, K) blocks as one matrix that a row is multiplied by."""
    return torch.block_diag(*blocks)


def published(mixer: SLSTM, x: Tensor) -> Tensor:
    """Convolution, the equations of section 2.2 with i = exp, and a norm for each head."""
    u = x
    if mixer.d_conv:
        taps, length = mixer.d_conv, x.shape[1]
        padded = torch.cat([torch.zeros_like(x[:, : taps - 1]), x], dim=1)
        u = sum(padded[:, w : w + length] * mixer.conv_weight[:, w] for w in range(taps))
        u = u + mixer.conv_bias
        u = u * torch.sigmoid(u)
    W = [dense(w) for w in mixer.gate_weight]
    R = [dense(r) for r in mixer.recurrent_weight]
    h = c = n = torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        i, f, z, o = (
            given[:, t] @ W[g] + h @ R[g] + mixer.gate_bias[g].flatten()
            for g, given in enumerate((u, u, x, x))
        )
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        heads = h.unflatten(-1, (mixer.n_heads, -1))
        centred = heads - heads.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        outputs.append((normed * mixer.norm_weight).flatten(1))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("options", [{}, {"n_heads": 2, "d_conv": 0}, {"n_heads": 3}], ids=str)
@torch.no_grad()
def test_one_pass_and_single_steps_equal_the_unstabilised_equations(options):
    mixer, x = build(**options), torch.randn(2, 40, 12, dtype=torch.float64)
    wanted = published(mixer, x)
    torch.testing.assert_close(mixer(x)[0], wanted)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted)


def test_gradients_equal_those_of_the_unstabilised_equations():
    mixer, x = build(), torch.randn(2, 15, 12, dtype=torch.float64, requires_grad=True)
    weight, sources = torch.randn_like(x), [x, *mixer.parameters()]
    found = torch.autograd.grad((mixer(x)[0] * weight).sum(), sources)
    wanted = torch.autograd.grad((published(mixer, x) * weight).sum(), sources)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_start_as_the_authors_do():
    K = 50
    for depth, power in ((0.0, 0.3), (0.5, 0.95), (1.0, 1.6)):
        mixer = SLSTM(4 * K, depth=depth)
        wanted = torch.tensor([5 - 12 * (j / (K - 1)) ** power for j in range(K)])
        torch.testing.assert_close(mixer.gate_bias[1], wanted.expand(4, K))
        assert not mixer.gate_bias[[0, 2, 3]].any()
        assert not mixer.recurrent_weight.any()
        assert abs(mixer.gate_weight.std() * (5 * 200 / 2) ** 0.5 - 1) < 0.02
    assert SLSTM(4).gate_bias.isfinite().all()  # one unit a head


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"n_heads": 5}, r"d_model=12 is not divisible by n_heads=5"),
        ({"d_conv": -1}, r"d_conv=-1 is not allowed"),
        ({"depth": 2.0}, r"depth=2.0 is not allowed; it must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SLSTM(12, **options)
