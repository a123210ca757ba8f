"""RG-LRU against transformers' RecurrentGemma, with the same weights.

Theirs adds up the recurrence in float32, so float64 parameters still compare at 1e-5. Its
convolution runs over document borders where the authors' own code does not: documents are compared
with a convolution of one tap, which has no border to cross.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context
from tests.tolerances import relative_error


def pair(d_model: int = 32, **options: int) -> tuple[nn.Module, nn.Module]:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )

    ours = create_mixer("rg_lru", d_model, **options).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    config = RecurrentGemmaConfig(
        hidden_size=d_model,
        lru_width=ours.width,
        num_attention_heads=ours.n_heads,
        conv1d_width=ours.conv_weight.shape[1],
        num_hidden_layers=1,
        vocab_size=8,
    )
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0).double()
    given = ours.state_dict()
    names = {"linear_y": "gate_proj", "linear_x": "in_proj", "linear_out": "out_proj"}
    weights = {f"{a}.{k}": given[f"{b}.{k}"] for a, b in names.items() for k in ("weight", "bias")}
    weights["conv_1d.weight"] = given["conv_weight"][:, None]
    weights["conv_1d.bias"] = given["conv_bias"]
    weights["rg_lru.recurrent_param"] = given["decay_param"]
    for i, gate in enumerate(("recurrent_gate", "input_gate")):
        weights[f"rg_lru.{gate}_weight"] = given["gate_weight"][i]
        weights[f"rg_lru.{gate}_bias"] = given["gate_bias"][i].view(ours.n_heads, -1)
    theirs.load_state_dict(weights)
    return ours, theirs


def positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)


def assert_same(ours: nn.Module, theirs: nn.Module, where: Tensor, ctx: Context) -> None:
    x = torch.randn(*where.shape, ours.d_model, dtype=torch.float64, requires_grad=True)
    found = ours(x, None, ctx)[0]
    wanted = theirs(x, where, None, use_cache=False)[0]
    assert relative_error(found, wanted) <= 1e-5
    weight = torch.randn_like(found)
    shared = [
        (ours.decay_param, theirs.rg_lru.recurrent_param),
        (ours.in_proj.weight, theirs.linear_x.weight),
        (ours.gate_proj.weight, theirs.linear_y.weight),
    ]
    a = torch.autograd.grad((found * weight).sum(), [x, *(p for p, _ in shared)])
    b = torch.autograd.grad((wanted * weight).sum(), [x, *(p for _, p in shared)])
    for mine, other in zip(a, b, strict=True):
        assert relative_error(mine, other) <= 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"width": 48, "n_heads": 3}, {"d_conv": 2, "n_heads": 1}], ids=str
)
def test_transformers_block_gives_the_same_numbers(options):
    ours, theirs = pair(**options)
    assert_same(ours, theirs, positions(41), Context())


def test_the_first_token_of_a_later_document_enters_whole():
    ours, theirs = pair(d_conv=1)
    ids = torch.repeat_interleave(torch.tensor([4, 1, 7]), torch.tensor([9, 1, 20])).expand(2, -1)
    assert_same(ours, theirs, positions(9, 1, 20), Context(document=ids))


def test_gradients_are_bounded_like_theirs_where_nothing_decays():
    ours, theirs = pair(d_conv=1)
    with torch.no_grad():
        ours.decay_param.copy_(torch.linspace(-22, -12, 32))
        theirs.rg_lru.recurrent_param.copy_(ours.decay_param)
    assert_same(ours, theirs, positions(12), Context())


def test_transformers_cache_goes_on_with_the_same_numbers():
    ours, theirs = pair()
    x, state = torch.randn(2, 15, 32, dtype=torch.float64), ours.init_state(2)
    with torch.no_grad():
        for start, piece in zip((0, 12, 13, 14), x.split((12, 1, 1, 1), dim=1), strict=True):
            where = torch.arange(start, start + piece.shape[1]).expand(2, -1)
            wanted = theirs(piece, where, None, use_cache=True)[0]
            found, state = ours(piece, state)
            assert relative_error(found, wanted) <= 1e-5
    assert relative_error(state.h, theirs.rg_lru.recurrent_states) <= 1e-5
    assert relative_error(state.tail, theirs.conv1d_state.mT) <= 1e-5
    assert state.seen.tolist() == [15, 15]


def test_parameters_start_as_published():
    """Decays at r = 1 in the paper's range; LeCun-normal gates; convolution variance 0.01 / W."""
    ours = create_mixer("rg_lru", 1024, n_heads=8)
    radius = torch.exp(-8 * softplus(ours.decay_param))
    assert 0.9 - 1e-4 <= radius.min() < 0.905
    assert 0.995 < radius.max() <= 0.999 + 1e-4
    assert abs(radius.square().mean() - (0.9**2 + 0.999**2) / 2) < 0.01
    assert abs(ours.gate_weight.std() * 128**0.5 - 1) < 0.02
    assert abs(ours.conv_weight.std() * 20 - 1) < 0.05
    assert not ours.gate_bias.any()
    assert not ours.conv_bias.any()


class Ours(nn.Module):
    """One of our mixers in the place of a block of theirs."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, **others: object) -> tuple[Tensor, None]:
        return self.mixer(x)[0], None


def test_a_whole_recurrent_gemma_with_our_mixers_gives_the_same_logits():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(
        hidden_size=32,
        lru_width=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_window_size=9,
        vocab_size=50,
    )
    model = RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    ids = torch.randint(0, 50, (2, 40))
    wanted = model(ids, use_cache=False).logits.detach()
    replaced = []
    for layer in model.model.layers:
        block = layer.temporal_block
        replaced.append(type(block).__name__)
        layer.temporal_block = Ours(
            attention_like(block) if hasattr(block, "q_proj") else like(block)
        )
    assert sorted(set(replaced)) == ["RecurrentGemmaAttention", "RecurrentGemmaRecurrentBlock"]
    assert relative_error(model(ids, use_cache=False).logits, wanted) <= 1e-4


def like(block: nn.Module) -> nn.Module:
    ours = create_mixer("rg_lru", 32)
    gates = block.rg_lru
    given = {"conv_weight": block.conv_1d.weight[:, 0], "conv_bias": block.conv_1d.bias}
    for mine, other in (("gate", "linear_y"), ("in", "linear_x"), ("out", "linear_out")):
        linear = block.get_submodule(other)
        given |= {f"{mine}_proj.weight": linear.weight, f"{mine}_proj.bias": linear.bias}
    given["decay_param"] = gates.recurrent_param
    given["gate_weight"] = torch.stack([gates.recurrent_gate_weight, gates.input_gate_weight])
    biases = [gates.recurrent_gate_bias, gates.input_gate_bias]
    given["gate_bias"] = torch.stack([b.flatten() for b in biases])
    ours.load_state_dict(given)
    return ours


def attention_like(block: nn.Module) -> nn.Module:
    ours = create_mixer(
        "attention",
        32,
        n_heads=4,
        n_kv_heads=1,
        window=9,
        bias=True,
        position={"name": "rope", "fraction": 0.5},
    )
    given = {name: x for name, x in block.state_dict().items() if "proj" in name}
    blank = {name: torch.zeros_like(x) for name, x in ours.state_dict().items() if "bias" in name}
    ours.load_state_dict(blank | given)
    return ours
