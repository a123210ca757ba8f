"""Length extrapolation, on models whose bits are known in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from seqzoo.long_context.extrapolation import extrapolation, usable_length

V = 8


def uniform(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, V)


def knows_early(tokens: Tensor) -> Tensor:
    """Certain of the next token (ids count up) at places below 16 of a window, uniform beyond."""
    sure = 100.0 * one_hot((tokens + 1) % V, V)
    place = torch.arange(tokens.shape[1])[None, :, None]
    return torch.where(place < 16, sure, torch.zeros(()))


class Counting:
    """A model with a state: it is certain once 4 tokens of the window were seen, in any pieces."""

    def __call__(self, tokens: Tensor, past_key_values=None, use_cache=False):
        seen = past_key_values or 0
        place = seen + torch.arange(tokens.shape[1])[None, :, None]
        sure = 100.0 * one_hot((tokens + 1) % V, V)
        logits = torch.where(place >= 4, sure, torch.zeros(()))
        return SimpleNamespace(logits=logits, past_key_values=seen + tokens.shape[1])


def stream(count: int) -> Tensor:
    return torch.arange(count) % V


def test_uniform_model_costs_log2_of_the_vocabulary_everywhere():
    rows = extrapolation(uniform, torch.randint(V, (129,)), [32, 16, 64])
    assert [row.length for row in rows] == [16, 32, 64]
    for row in rows:
        assert row.bits == pytest.approx(3, abs=1e-6)
        assert row.final == pytest.approx(3, abs=1e-6)
        assert row.targets == 128  # the same targets at every length, the last token among them


def test_positions_show_where_the_model_breaks_and_the_target_is_the_next_token():
    rows = extrapolation(knows_early, stream(129), [16, 64])
    short, long = rows
    assert short.bits == pytest.approx(0, abs=1e-6)
    assert long.bits == pytest.approx(3 * 48 / 64, abs=1e-6)
    assert long.positions == tuple(
        (low, high, pytest.approx(0 if high <= 16 else 3, abs=1e-6))
        for low, high in [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    )


def test_final_compares_the_same_targets_at_every_length():
    # Only the last 8 targets of each 64 are hard; the windows of 16 before them must not dilute it.
    hard = stream(129)
    for end in (64, 128):
        hard[end - 7 : end + 1] = hard[end - 7 : end + 1].flip(0)
    rows = extrapolation(knows_early, hard, [16, 32, 64])
    assert rows[0].final > 10
    assert rows[1].final == pytest.approx(3, abs=1e-6)  # places 24..31: uniform
    assert rows[2].final == pytest.approx(3, abs=1e-6)


def test_chunks_hand_the_state_on_and_each_window_starts_without_one():
    whole = extrapolation(Counting(), stream(65), [8, 32])
    pieces = extrapolation(Counting(), stream(65), [8, 32], chunk=3, tokens_per_pass=6)
    assert pieces == whole
    assert whole[0].bits == pytest.approx(3 * 4 / 8, abs=1e-6)
    assert whole[1].bits == pytest.approx(3 * 4 / 32, abs=1e-6)


def test_batches_of_windows_change_nothing():
    tokens = stream(129)
    assert extrapolation(knows_early, tokens, [16, 64], tokens_per_pass=16) == extrapolation(
        knows_early, tokens, [16, 64]
    )


def test_usable_length_stops_at_the_first_length_that_breaks():
    rows = extrapolation(knows_early, stream(129), [8, 16, 32, 64])
    assert usable_length(rows, base=8) == 16
    assert usable_length(rows, base=8, tolerance=2**3.1) == 64
    with pytest.raises(
        ValueError, match=r"length 24 was not measured; measured: \[8, 16, 32, 64\]"
    ):
        usable_length(rows, base=24)


@pytest.mark.parametrize(
    ("count", "lengths", "words"),
    [
        (65, [24, 64], "length 24 does not divide the longest, 64"),
        (64, [32, 64], "64 tokens are too few for length 64; it takes 65"),
        (65, [], "no lengths given"),
        (65, [0, 64], "length=0 is not allowed"),
    ],
)
def test_lengths_that_cannot_share_their_targets_are_refused(count, lengths, words):
    with pytest.raises(ValueError, match=words):
        extrapolation(uniform, stream(count), lengths)


def test_logits_in_half_precision_are_summed_in_full():
    def half(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, V, dtype=torch.bfloat16)

    (row,) = extrapolation(half, stream(4097), [4096])
    assert row.bits == pytest.approx(math.log2(V), abs=1e-6)
