"""The attention mixer against transformers' Llama, and what a rolling cache must keep."""

from itertools import pairwise

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context
from tests.tolerances import law_budget, relative_error

D, T, B = 48, 29, 2


def llama(n_kv_heads):
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=6,
        num_key_value_heads=n_kv_heads,
        attn_implementation="eager",
    )
    return LlamaAttention(config, layer_idx=0).eval(), LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("n_kv_heads", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("window", [None, 5])
def test_equals_llama_with_its_weights_in_output_and_gradients(n_kv_heads, window):
    theirs, rotary = llama(n_kv_heads)
    ours = create_mixer(
        "attention", D, n_heads=6, n_kv_heads=n_kv_heads, window=window, position="rope"
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, D, requires_grad=True)
    t = torch.arange(T)
    seen = (t[:, None] >= t) & (t[:, None] - t < (window or T))
    barred = torch.zeros(T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    wanted = theirs(x, rotary(x, t.expand(B, T)), barred.expand(B, 1, T, T))[0]
    y = ours(x)[0]
    assert relative_error(y, wanted) <= 1e-5
    weight = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, *ours.parameters()), weight)
    true = torch.autograd.grad(wanted, (x, *theirs.parameters()), weight)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, true, strict=True))


def test_left_padded_rows_equal_llama_with_shifted_positions():
    theirs, rotary = llama(2)
    ours = create_mixer("attention", D, n_heads=6, n_kv_heads=2, position="rope")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, D)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :7] = False
    seen = torch.ones(T, T, dtype=torch.bool).tril() & mask[:, None, :]
    barred = torch.zeros(B, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    wanted = theirs(x, rotary(x, positions), barred[:, None])[0]
    y = ours(x, None, Context(mask=mask))[0]
    assert relative_error(y[mask], wanted[mask]) <= 1e-5


WINDOWS = [
    {"window": 5},
    {"window": 1},
    {"window": 5, "sinks": 2, "position": "alibi"},
    {"window": 1, "sinks": 3, "position": "rope"},
    {"window": 4, "sinks": 1, "position": "xpos", "n_kv_heads": 2},
]
FULL = [{}, {"position": "rope"}, {"position": "alibi", "softcap": 3.0}, {"position": "xpos"}]


def packing(where):
    mask = torch.ones(B, T, dtype=torch.bool)
    document = torch.zeros(B, T, dtype=torch.long)
    if where == "padding":
        mask = torch.rand(B, T) > 0.4
        mask[0, :9] = False
    if where != "one document":
        document[0, 11:] += 1
        document[0, 13:] -= 1  # the same id again is a document of its own
        document[1, 25:] = 7
    return mask, document


@pytest.mark.parametrize("where", ["one document", "documents", "padding"])
@pytest.mark.parametrize("options", [*WINDOWS, *FULL], ids=str)
def test_any_split_gives_the_same_outputs_and_the_same_cache(options, where):
    mixer = create_mixer("attention", D, **options).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    mask, document = packing(where)
    whole, after = mixer(x, mixer.init_state(B), Context(mask=mask, document=document))
    stateless = mixer(x, None, Context(mask=mask, document=document))[0]
    assert relative_error(stateless[mask], whole[mask]) <= law_budget(x.dtype)
    for cuts in ([0, 1, 9, 12, T], [0, 3, 3, 26, T], list(range(T + 1))):
        state, last, parts = mixer.init_state(B), document[:, 0], []
        for start, stop in pairwise(cuts):
            here, ids = mask[:, start:stop], document[:, start:stop]
            y, state = mixer(x[:, start:stop], state, Context(here, ids, last_document=last))
            parts.append(y)
            for t in range(stop - start):
                last = torch.where(here[:, t], ids[:, t], last)
        assert relative_error(torch.cat(parts, 1)[mask], whole[mask]) <= law_budget(x.dtype)
        for a, b in zip(state, after, strict=True):
            assert torch.equal(a, b) or relative_error(a, b) <= law_budget(x.dtype)


def test_a_window_keeps_the_first_and_the_last_real_tokens_only():
    mixer = create_mixer("attention", D, window=4, sinks=2)
    x = torch.randn(1, 12, D)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0]]).bool()
    state = mixer(x, mixer.init_state(1), Context(mask=mask))[1]
    kept = x[:, mask[0]][:, [0, 1, 5, 6, 7]]
    torch.testing.assert_close(state.k.flatten(2), mixer.k_proj(kept))
    torch.testing.assert_close(state.v.flatten(2), mixer.v_proj(kept))
    assert state.positions.tolist() == [[0, 1, 5, 6, 7]]
    assert state.next.tolist() == [8]
    assert state.mask.all()
    few = mixer(x[:, :3], mixer.init_state(1), Context(mask=mask[:, :3]))[1]
    assert few.mask.tolist() == [[True, True, False, False, False]]
    assert not few.k[~few.mask].any()


def test_the_cache_holds_nothing_of_an_ended_document():
    mixer = create_mixer("attention", D, window=6)
    x = torch.randn(1, 9, D)
    document = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1]])
    state = mixer(x, mixer.init_state(1), Context(document=document))[1]
    assert state.mask.tolist() == [[False, False, False, True, True]]
    assert not state.k[~state.mask].any()


def test_a_window_has_constant_bytes_and_the_full_cache_grows():
    def size(state):
        return sum(x.nbytes for x in state)

    x = torch.randn(1, 40, D)
    rolling = create_mixer("attention", D, window=6, sinks=2, n_kv_heads=2)
    full = create_mixer("attention", D, n_kv_heads=2)
    for mixer in (rolling, full):
        for length in (0, 3, 40):
            state = mixer(x[:, :length], mixer.init_state(1))[1]
            assert size(state) == mixer.cost(length).state_bytes
    assert rolling.cost(0).state_bytes == rolling.cost(40).state_bytes
    assert (rolling.caps.state, full.caps.state) == ("window", "growing")


def test_positions_from_outside_turn_heads_and_measure_distances():
    x = torch.randn(B, T, D, dtype=torch.float64)
    for name in ("rope", "alibi", "xpos"):
        mixer = create_mixer("attention", D, position=name).double()
        y = mixer(x)[0]
        shifted = Context(positions=torch.arange(T).expand(B, T) + 100)
        torch.testing.assert_close(mixer(x, None, shifted)[0], y)
        spread = Context(positions=3 * torch.arange(T).expand(B, T))
        far = mixer(x, None, spread)[0]
        assert relative_error(far, y) > 1e-3
        state, parts = mixer.init_state(B), []
        for t in range(T):
            here = Context(positions=spread.positions[:, t : t + 1])
            step, state = mixer(x[:, t : t + 1], state, here)
            parts.append(step)
        torch.testing.assert_close(torch.cat(parts, 1), far)


def test_under_autocast_a_split_is_computed_as_the_whole_and_the_cache_keeps_its_dtype():
    mixer = create_mixer("attention", D, position="rope", window=8, qk_norm=True)
    x = torch.randn(B, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        whole = mixer(x)[0]
        y, state = mixer(x[:, :20], mixer.init_state(B))
        rest, state = mixer(x[:, 20:], state)
    assert state.k.dtype == torch.float32
    assert relative_error(torch.cat([y, rest], 1), whole) <= 8e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 8}, "d_model=100 is not divisible by n_heads=8; nearest: 96, 104"),
        ({"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
        ({"window": 0}, "window=0 is not allowed"),
        ({"softcap": 0.0}, "softcap=0.0 is not allowed"),
        ({"sinks": 2}, "sinks=2 is not allowed"),
        ({"head_dim": 0}, "head_dim=0 is not allowed"),
        ({"position": "learned"}, "needs max_length"),
        ({"position": "sinusoidal"}, "is added to the embedding"),
        ({"n_heads": 5, "position": "xpos", "causal": False}, "needs causal=True"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("attention", 100, **options)


def test_a_bidirectional_pass_sees_the_future_and_takes_no_state():
    mixer = create_mixer("attention", D, causal=False, window=3)
    assert mixer.caps.causality == "none"
    assert mixer.init_state(B) == ()
    x = torch.randn(1, 9, D, requires_grad=True)
    (g,) = torch.autograd.grad(mixer(x)[0][:, 4].sum(), x)
    reached = g.abs().sum((0, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    state = create_mixer("attention", D).init_state(1)
    with pytest.raises(ValueError, match="no state to go on from"):
        mixer(x, state)
