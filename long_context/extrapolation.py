"""Does a language model still predict beyond the length it was trained on?

One stretch of held-out tokens, cut anew for every length L into windows of L that follow each other
without overlap. The lengths divide the longest, so every length predicts exactly the same targets,
each once; only the context differs. Three figures a length, in bits a target:

- `bits`: over all targets. It falls with L even for a model that forgets, because fewer targets
  stand near the start of a window (the "early token curse" of Press et al., 2022,
  arXiv:2108.12409, appendix B).
- `final`: over the last half-of-the-shortest-length targets of every longest window: the same
  targets for every length, seen with a context of almost L. This is the figure that tells whether
  a longer context helps or harms.
- `positions`: by place in the window, in buckets that double.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seqzoo.kernels.errors import check_positive


@dataclass(frozen=True)
class Row:
    """What one length gives.

    Attributes:
        length: tokens a window.
        bits: mean over all targets.
        final: mean over the targets at the end of the longest windows, which all lengths share.
        positions: (from, to, bits) of the targets that stand at those places of a window.
        targets: how many targets `bits` is a mean of.
    """

    length: int
    bits: float
    final: float
    positions: tuple[tuple[int, int, float], ...]
    targets: int


def extrapolation(
    model: Callable[..., Any],
    tokens: Tensor,
    lengths: Sequence[int],
    *,
    chunk: int | None = None,
    tokens_per_pass: int = 16384,
    device: torch.device | str | None = None,
) -> list[Row]:
    """Bits a target at each length, on the same targets.

    Args:
        model: `model(tokens (B, T))` gives logits (B, T, V), or an object with `.logits`.
        tokens: (S,) held-out ids. The last window's target is the token after it, so S must exceed
            the longest length; what does not fill a longest window is left out.
        lengths: lengths to measure; each must divide the longest.
        chunk: read windows in pieces of this many tokens, from state to state, so that memory does
            not grow with the length. The model must then also take `past_key_values` and
            `use_cache=True`, as Hugging Face's causal language models do.
        tokens_per_pass: windows times their length (or times `chunk`) in one call.
        device: where the model lives; the tokens' device when None.

    Raises:
        ValueError: a length that does not divide the longest, or too few tokens.
    """
    longest = _check(tokens, lengths, chunk, tokens_per_pass)
    count = (tokens.numel() - 1) // longest
    used = tokens.flatten()[: count * longest + 1].to(device or tokens.device, torch.long)
    tail = math.ceil(min(lengths) / 2)
    rows = []
    for length in sorted(set(lengths)):
        x, y = used[:-1].view(-1, length), used[1:].view(-1, length)
        losses = _losses(model, x, y, min(chunk or length, length), chunk, tokens_per_pass)
        last = losses[longest // length - 1 :: longest // length, -tail:]
        rows.append(
            Row(
                length=length,
                bits=losses.mean().item(),
                final=last.mean().item(),
                positions=tuple(
                    (low, high, losses[:, low:high].mean().item()) for low, high in _buckets(length)
                ),
                targets=losses.numel(),
            )
        )
    return rows


def usable_length(rows: Sequence[Row], *, base: int, tolerance: float = 1.05) -> int:
    """The longest length up to which perplexity stays within `tolerance` of that at `base`.

    Compares `final`, the figure whose targets do not change with the length.

    Raises:
        ValueError: `base` was not measured.
    """
    by_length = {row.length: row for row in rows}
    if base not in by_length:
        raise ValueError(f"length {base} was not measured; measured: {sorted(by_length)}")
    allowed = by_length[base].final + math.log2(tolerance)
    usable = base
    for row in sorted(rows, key=lambda row: row.length):
        if row.length > base:
            if row.final > allowed:
                break
            usable = row.length
    return usable


@torch.inference_mode()
def _losses(
    model: Callable[..., Any], x: Tensor, y: Tensor, step: int, chunk: int | None, budget: int
) -> Tensor:
    """Bits of each target, (windows, length), float64 on the CPU."""
    together = max(1, budget // step)
    done = []
    for rows in range(0, x.shape[0], together):
        pieces, state = [], None
        for start in range(0, x.shape[1], step):
            piece = x[rows : rows + together, start : start + step]
            target = y[rows : rows + together, start : start + step]
            if chunk is None:
                logits = _logits(model(piece))
            else:
                out = model(piece, past_key_values=state, use_cache=True)
                logits, state = _logits(out), out.past_key_values
            loss = cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
            pieces.append(loss.double().cpu() / math.log(2))
        done.append(torch.cat(pieces, dim=1))
    return torch.cat(done)


def _logits(out: Any) -> Tensor:  # noqa: ANN401
    return out if isinstance(out, Tensor) else out.logits


def _buckets(length: int) -> list[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ... up to `length`."""
    edges = [0, *(2**i for i in range(length.bit_length())), length]
    unique = sorted({edge for edge in edges if edge <= length})
    return list(pairwise(unique))


def _check(tokens: Tensor, lengths: Sequence[int], chunk: int | None, budget: int) -> int:
    if not lengths:
        raise ValueError("no lengths given; give at least one, e.g. 512")
    check_positive(tokens_per_pass=budget, chunk=1 if chunk is None else chunk)
    longest = max(lengths)
    for length in lengths:
        check_positive(length=length)
        if longest % length:
            raise ValueError(
                f"length {length} does not divide the longest, {longest}: the lengths could not "
                "share their targets; use doublings, e.g. 512,1024,2048"
            )
    if tokens.numel() <= longest:
        raise ValueError(
            f"{tokens.numel()} tokens are too few for length {longest}; it takes {longest + 1}"
        )
    return longest
