"""Attention-free transformers: each channel averages by keys of its own and a bias of positions.

    y_t = W_o (sigmoid(q_t) * sum_{s<=t} e^{k_s + w_ts} v_s / sum_{s<=t} e^{k_s + w_ts})

AFT-simple has w = 0: O(T) time and three numbers of state a channel. AFT-full learns w, AFT-local
learns it where t - s is below a window and has w = 0 beyond: O(T^2) time, as far as `max_length`.
Zhai et al., 2021, arXiv:2105.14103, sections 3.1 and 3.2. The output projection is that of the
attention it stands in for.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.wkv import no_tokens, wkv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, Recompute, State

BLOCK = 32  # queries that look at each other one by one, and at earlier keys in one product


class AFTSimpleState(NamedTuple):
    """Numerator, denominator and log maximum, (B, 3, R)."""

    sums: Tensor


class AFTSimple(Mixer):
    """AFT-simple: each channel averages the values so far by the softmax of its own keys.

    Args:
        d_model: width D.
        width: width R of queries, keys and values; `d_model` when None.
        bias: biases in the projections but that of keys, where one cancels.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2105.14103"
    kernel = "wkv"
    variants = ({"width": 48, "bias": False},)

    def __init__(self, d_model: int, *, width: int | None = None, bias: bool = True) -> None:
        super().__init__()
        width = d_model if width is None else width
        check_positive(d_model=d_model, width=width)
        self.d_model, self.width = d_model, width
        self.q_proj = nn.Linear(d_model, width, bias=bias)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=bias)
        self.o_proj = nn.Linear(width, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        k = self.k_proj(x)
        none = torch.zeros(self.width, device=k.device, dtype=accumulator(k.dtype))
        average, sums = wkv(
            k,
            self.v_proj(x),
            none,
            none,
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        y = self.o_proj(torch.sigmoid(self.q_proj(x)) * average)
        return y, None if state is None else AFTSimpleState(sums)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AFTSimpleState:
        """No tokens."""
        like = self.k_proj.weight
        wide = accumulator(dtype or like.dtype)
        return AFTSimpleState(no_tokens(batch_size, self.width, device or like.device, wide))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        weights = 4 * self.d_model * self.width
        biases = 0 if self.q_proj.bias is None else 2 * self.width + self.d_model
        return Cost(weights + biases, 2 * length * weights, 12 * self.width)


class AFTFull(Recompute):
    """AFT-full, and with a window AFT-local: averages by keys and a learned bias of positions.

    The bias of positions t and s of a document is the product of two learned vectors of `rank`.

    Args:
        d_model: width D.
        max_length: longest sequence; beyond, there is no bias to look up.
        rank: size of those vectors, 128 in the paper.
        window: W: the bias is 0 where t - s >= W, which stay visible; no limit when None.
        width: width R of queries, keys and values; `d_model` when None.
        bias: biases in the projections but that of keys, where one cancels.
    """

    caps = Caps(state="growing")
    paper = "arXiv:2105.14103"
    variants = ({"window": 20, "rank": 8, "width": 48, "bias": False},)

    def __init__(
        self,
        d_model: int,
        *,
        max_length: int = 4096,
        rank: int = 128,
        window: int | None = None,
        width: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        width = d_model if width is None else width
        check_positive(d_model=d_model, max_length=max_length, rank=rank, width=width)
        if window is not None:
            check_positive(window=window)
        self.d_model, self.max_length, self.rank = d_model, max_length, rank
        self.window, self.width = window, width
        self.q_proj = nn.Linear(d_model, width, bias=bias)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=bias)
        self.o_proj = nn.Linear(width, d_model, bias=bias)
        self.query_position = nn.Parameter(torch.empty(max_length, rank))
        self.key_position = nn.Parameter(torch.empty(max_length, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both factors normal with deviation 0.01, a bias of nearly nothing."""
        nn.init.normal_(self.query_position, std=0.01)
        nn.init.normal_(self.key_position, std=0.01)

    def mix(self, x: Tensor, document: Tensor | None) -> Tensor:
        """See `Recompute.mix`.

        Raises:
            ValueError: the sequence is longer than `max_length`.
        """
        T, longest = x.shape[1], self.max_length
        if longest < T:
            raise ValueError(
                f"{T} tokens have no bias beyond max_length={longest}; build the mixer with a"
                " larger max_length"
            )
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        wide = accumulator(k.dtype)
        index = torch.arange(T, device=x.device)[None]
        begun = torch.zeros_like(index)  # documents before that of each token
        if document is not None:
            ctx = Context(document=document)
            index, begun = ctx.index(x), ctx.reset.long().cumsum(1)  # type: ignore[union-attr]
        with full_precision(x):
            k, v = k.to(wide), v.to(wide)
            blocks = [
                self._average(k, v, index, begun, start, min(start + BLOCK, T))
                for start in range(0, T, BLOCK)
            ]
        average = torch.cat(blocks, dim=1) if blocks else v
        y: Tensor = self.o_proj(torch.sigmoid(q) * average.to(q.dtype))
        return y

    def _average(
        self, k: Tensor, v: Tensor, index: Tensor, begun: Tensor, start: int, stop: int
    ) -> Tensor:
        """Tokens from `start` to `stop`: keys of the block by sums, earlier ones by products.

        A product e^w e^k has to be scaled by the largest of either factor. Within the block that
        would mix up what single tokens may see, so there k + w is formed for each pair.
        """
        w = self._bias(index, start, stop).to(k.dtype)
        order = torch.arange(stop, device=k.device)
        seen = begun[:, start:stop, None] == begun[:, None, :stop]
        w = w.masked_fill(~seen | (order[start:, None] < order), -torch.inf)
        near = k[:, None, start:stop] + w[..., start:, None]  # (B, C, C, R)
        top = near.detach().amax(2)
        if start == 0:
            numerator = denominator = torch.zeros_like(top)
        else:
            # Whatever the block sees before it is of the document that ends there.
            seen = begun[:, :start] == begun[:, start - 1 : start]
            far = torch.where(seen[..., None], k[:, :start], -torch.inf)
            w_top, k_top = w[..., :start].detach().amax(-1, True), far.detach().amax(1, True)
            top = torch.maximum(top, k_top + w_top)
            far, w_far = torch.exp(far - k_top), torch.exp(w[..., :start] - w_top.clamp(min=-1e30))
            sums = w_far @ torch.cat([far * v[:, :start], far], dim=-1)
            sums = torch.unflatten(sums, -1, (2, -1)) * torch.exp(k_top + w_top - top)[:, :, None]
            numerator, denominator = sums.unbind(2)
        near = torch.exp(near - top[:, :, None])
        numerator = numerator + (near * v[:, None, start:stop]).sum(2)
        return numerator / (denominator + near.sum(2))

    def _bias(self, index: Tensor, start: int, stop: int) -> Tensor:
        """The bias of the tokens from `start` against all up to `stop`: (B or 1, C, stop)."""
        queries = self.query_position[index[:, start:stop]]
        w = queries @ self.key_position[index[:, :stop]].mT
        if self.window is None:
            return w
        distance = index[:, start:stop, None] - index[:, None, :stop]
        return torch.where(distance < self.window, w, 0)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, R, T = self.d_model, self.width, length
        biases = 0 if self.q_proj.bias is None else 2 * R + D
        parameters = 4 * D * R + biases + 2 * self.max_length * self.rank
        flops = 2 * T * 4 * D * R
        for start in range(0, T, BLOCK):
            stop = min(start + BLOCK, T)
            flops += 2 * (stop - start) * (stop * self.rank + start * 2 * R)
        return Cost(parameters, flops, T * (4 * D + 1 + 8))
