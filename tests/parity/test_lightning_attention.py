"""Lightning attention against transformers' MiniMax with the same weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T, LAYERS = 32, 2, 75, 5
PLACES = [(4, 0), (4, 3), (6, 1), (1, 4)]  # heads, and which layer of the stack


def pair(n_heads: int, layer: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The two mixers with the same stirred weights."""
    width = D if D % n_heads == 0 else 8 * n_heads
    scale = 1 - layer / (LAYERS - 1 + 1e-5) + 1e-5
    ours = create_mixer("lightning_attention", width, n_heads=n_heads, slope_scale=scale)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    config = MiniMaxConfig(
        hidden_size=width,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        num_hidden_layers=LAYERS,
        block_size=16,
    )
    other = MiniMaxLightningAttention(config, layer_idx=layer)
    # theirs packs q, k and v head by head
    packed = [p.weight.view(n_heads, -1, width) for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
    weights = {
        "qkv_proj.weight": torch.cat(packed, dim=1).flatten(0, 1),
        "output_gate.weight": ours.gate_proj.weight,
        "out_proj.weight": ours.o_proj.weight,
        "norm.weight": ours.norm.weight,
    }
    slopes = {k: v for k, v in other.state_dict().items() if k not in weights}
    other.load_state_dict(weights | slopes)
    return ours.to(dtype), other.to(dtype).eval()


def theirs(other: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return other(x, position_embeddings=(x, x), attention_mask=None)  # it reads no positions


@pytest.mark.parametrize(("n_heads", "layer"), PLACES)
def test_equals_transformers_with_its_weights_in_output_state_and_gradients(n_heads, layer):
    ours, other = pair(n_heads, layer, torch.float32)
    x = torch.randn(B, T, ours.d_model, requires_grad=True)
    found, state = ours(x, ours.init_state(B))
    wanted, last = theirs(other, x)
    assert relative_error(found, wanted) <= 1e-5
    assert relative_error(state.S, last) <= 1e-5
    weight = torch.randn_like(found)
    got, true = (
        torch.autograd.grad((y * weight).sum(), [x, gate.weight, norm.weight, out.weight])
        for y, gate, norm, out in (
            (found, ours.gate_proj, ours.norm, ours.o_proj),
            (wanted, other.output_gate, other.norm, other.out_proj),
        )
    )
    assert all(relative_error(a, b) <= 2e-5 for a, b in zip(got, true, strict=True))


def test_token_by_token_equals_transformers_in_one_pass():
    ours, other = pair(4, 1, torch.float32)
    x = torch.randn(B, 40, D)
    state, steps = ours.init_state(B), []
    for token in x.split(1, dim=1):
        y, state = ours(token, state)
        steps.append(y)
    assert relative_error(torch.cat(steps, dim=1), theirs(other, x)[0]) <= 1e-5


def test_no_slope_never_forgets():
    mixer = create_mixer("lightning_attention", D, slope_scale=0.0).double()
    x = torch.randn(1, 5000, D, dtype=torch.float64)
    k, v = (
        torch.nn.functional.silu(p(x)).view(1, 5000, 4, -1) for p in (mixer.k_proj, mixer.v_proj)
    )
    wanted = torch.einsum("bthk,bthv->bhkv", k, v)
    assert relative_error(mixer(x, mixer.init_state(1))[1].S, wanted) <= 1e-10


def test_a_growing_state_or_a_bad_head_count_is_refused():
    with pytest.raises(ValueError, match=r"slope_scale=-1.0 is not allowed; it must be 0 or more"):
        create_mixer("lightning_attention", D, slope_scale=-1.0)
    with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5; nearest: 30"):
        create_mixer("lightning_attention", D, n_heads=5)
