"""Gated DeltaProduct around flash-linear-attention's loop; with one step it is Gated DeltaNet."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus

from seqzoo.layers import create_mixer
from tests.fla_naive import fla_naive
from tests.tolerances import relative_error

D, B, T = 32, 2, 50


def build(name: str, **options: object) -> nn.Module:
    mixer = create_mixer(name, D, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        mixer.dt_bias += 2  # steps long enough for the decay to matter
    return mixer


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize(("n", "H", "K", "W"), [(2, 4, 8, 4), (3, 2, 6, 2)])
def test_gated_deltaproduct_is_its_paper_around_the_loop_of_flash_linear_attention(
    n, H, K, W, negative
):
    mixer = build(
        "gated_deltaproduct",
        n_householder=n,
        n_heads=H,
        head_dim=K,
        d_conv=W,
        negative_eigenvalues=negative,
    )
    x = torch.randn(B, T, D)
    V = 2 * K
    widths = [H * K, n * H * K, n * H * V]

    def feature(projection: nn.Linear, weight: Tensor, size: int) -> Tensor:
        """The n steps of a token one after the other in time: (B, n T, H, size)."""
        u = (x @ projection.weight.T).transpose(1, 2)
        u = conv1d(u, weight[:, None], padding=W - 1, groups=len(weight))[..., :T]
        return silu(u).transpose(1, 2).reshape(B, -1, H, size)

    q, k, v = (
        feature(p, w, size)
        for p, w, size in zip(
            (mixer.q_proj, mixer.k_proj, mixer.v_proj),
            mixer.conv_weight.split(widths),
            (K, K, V),
            strict=True,
        )
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = (1 + negative) * torch.sigmoid(x @ mixer.beta_proj.weight.T).reshape(B, -1, H)
    g = -mixer.A_log.exp() * softplus(x @ mixer.decay_proj.weight.T + mixer.dt_bias)
    o, last = fla_naive("gated_delta_product").naive_recurrent_gated_delta_product(
        q, k, v, g, beta, K**-0.5, output_final_state=True, num_householder=n
    )
    o = mixer.norm_weight * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gate = silu(x @ mixer.gate_proj.weight.T)
    wanted = (o.flatten(-2) * gate) @ mixer.o_proj.weight.T
    y, state = mixer(x, mixer.init_state(B))
    assert relative_error(y, wanted) <= 1e-5
    assert relative_error(state.S, last) <= 1e-5


def test_with_one_step_it_is_gated_deltanet():
    mixer = build("gated_deltaproduct", n_householder=1, negative_eigenvalues=False)
    other = create_mixer("gated_deltanet", D)
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(B, T, D)
    assert torch.equal(mixer(x)[0], other(x)[0])


def test_a_token_needs_a_step():
    with pytest.raises(ValueError, match="n_householder=0 is not allowed"):
        create_mixer("gated_deltaproduct", D, n_householder=0)
