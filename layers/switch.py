"""Switch: every token goes through the one expert that its router finds most probable.

    p_t = softmax(W_r x_t),  e = argmax p_t (the lowest of equals),  y_t = p_{t,e} MLP_e(x_t)

O(T) time, whatever the number of experts. Fedus et al., 2021, arXiv:2101.03961, sections 2.1 to
2.4; z-loss: Zoph et al., 2022, arXiv:2202.08906, equation 5. A token that finds its expert full
gets 0, so that the residual alone carries it. Capacity is counted in the order of tokens within
each document, first come, first served: no later token can drive out an earlier one. The paper's
capacity grows with the batch; here it is a constant made from `max_length`, else a prefix would
depend on how the sequence goes on, and streaming on the size of the pieces.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.experts import experts
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.mlp import ACTIVATIONS, check_activation, hidden_width


class SwitchState(NamedTuple):
    """Tokens that each expert was chosen for in the document so far, (B, E) int64."""

    counts: Tensor


class Switch(Mixer):
    """Top-1 mixture of feed-forward experts; dropless unless `max_length` is given.

    Each pass adds two losses to `ctx.losses`, already weighted, and to `ctx.stats` the fraction of
    tokens dropped and the load of each expert (E,), 1 when balanced, under numbered names.

    Args:
        d_model: width D.
        n_experts: experts E.
        expand: hidden width of an expert as a multiple of D.
        hidden: hidden width; from `expand` when None.
        activation: `gelu` (exact), `relu`, `relu2` or `silu`.
        capacity_factor: an expert takes ceil(capacity_factor max_length / E) tokens of a document.
        max_length: tokens that capacity is made for; None drops no token.
        jitter: in training, the router's inputs are multiplied by uniform noise in 1 -+ jitter; the
            paper uses 0.01.
        balance_loss: weight of E sum_e f_e P_e, with f_e the fraction of tokens that chose expert e
            and P_e its mean probability; 1 at balance.
        z_loss: weight of the mean squared logsumexp of the router's logits.
    """

    caps = Caps(state="none")
    kind = "channel"
    paper = "arXiv:2101.03961"
    kernel = "experts"
    variants = ({"max_length": 40, "n_experts": 4, "capacity_factor": 0.5, "hidden": 20},)

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int = 8,
        expand: float = 4,
        hidden: int | None = None,
        activation: str = "relu",
        capacity_factor: float = 1.25,
        max_length: int | None = None,
        jitter: float = 0.0,
        balance_loss: float = 1e-2,
        z_loss: float = 1e-3,
    ) -> None:
        super().__init__()
        self.d_model, self.hidden = d_model, hidden_width(d_model, expand, hidden, 1)
        check_positive(n_experts=n_experts, capacity_factor=capacity_factor)
        check_activation("switch", activation)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter} is not allowed; it must be in [0, 1)")
        self.n_experts, self.activation, self.jitter = n_experts, activation, jitter
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.capacity: int | None = None
        if max_length is not None:
            check_positive(max_length=max_length)
            self.capacity = math.ceil(capacity_factor * max_length / n_experts)
            self.caps = Caps(state="constant")
        # Not an nn.Linear, which half precision would reach: it must be float32.
        self.router_weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.w_in = nn.Parameter(torch.empty(n_experts, d_model, self.hidden))
        self.w_out = nn.Parameter(torch.empty(n_experts, self.hidden, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, variance 0.1 / inputs: a tenth of the usual (section 2.4)."""
        for weight, inputs in (
            (self.router_weight, self.d_model),
            (self.w_in, self.d_model),
            (self.w_out, self.hidden),
        ):
            nn.init.trunc_normal_(weight, std=math.sqrt(0.1 / inputs))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        logits = self._route(x)
        p = logits.softmax(-1)
        index = p.argmax(-1, keepdim=True)  # the first of equals
        chosen = one_hot(index[..., 0], self.n_experts)
        if ctx.mask is not None:
            chosen = chosen * ctx.mask[..., None]
        taken = chosen
        if self.capacity is not None:
            place, state = self._place(chosen, state, ctx.reset)
            taken = chosen * (place < self.capacity)
        self._report(logits, p, chosen, taken, ctx)
        index = torch.where(taken.gather(-1, index) > 0, index, -1)
        y = experts(
            x.flatten(0, 1),
            index.flatten(0, 1),
            p.gather(-1, index.clamp(min=0)).flatten(0, 1),
            self.w_in,
            self.w_out,
            activation=ACTIVATIONS[self.activation],
        )
        return y.view_as(x), state

    def _route(self, x: Tensor) -> Tensor:
        """(B, T, E) logits, float32 or wider."""
        x = x.to(accumulator(x.dtype))
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with full_precision(x):
            return linear(x, self.router_weight.to(x.dtype))

    def _place(
        self, chosen: Tensor, state: State | None, reset: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """How many earlier tokens of the document chose each expert, (B, T, E), and the state."""
        B, T, E = chosen.shape
        count = chosen.new_zeros(B, E) if state is None else state[0]
        after = chosen.cumsum(1) + count[:, None]
        before = after - chosen
        if reset is not None:  # counts never fall, so the largest at a reset is that of the latest
            begun = torch.where(reset[..., None], before, 0)
            begun = begun.cummax(1).values if T else begun
            before, after = before - begun, after - begun
        if state is None:
            return before, None
        return before, SwitchState(torch.cat([count[:, None], after], dim=1)[:, -1])

    def _report(
        self, logits: Tensor, p: Tensor, chosen: Tensor, taken: Tensor, ctx: Context
    ) -> None:
        """Write losses and stats of the real tokens; a pass without any adds zeros."""
        E = self.n_experts
        real = logits.new_ones(logits.shape[:2]) if ctx.mask is None else ctx.mask.to(logits.dtype)
        n = real.sum().clamp(min=1)
        fraction = chosen.sum((0, 1)) / n
        # Junk may make a product infinite, so what is masked is taken out, not multiplied by 0.
        mean = torch.where(real[..., None] > 0, p, 0).sum((0, 1)) / n
        z = torch.where(real > 0, logits.logsumexp(-1).square(), 0).sum() / n
        name = _fresh(ctx.losses, "switch", "balance")
        ctx.losses[f"{name}_balance"] = self.balance_loss * E * (fraction * mean).sum()
        ctx.losses[f"{name}_z"] = self.z_loss * z
        ctx.stats[f"{name}_dropped"] = (chosen - taken).sum() / n
        ctx.stats[f"{name}_load"] = fraction.detach() * E

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """No token counted; nothing to count when no token is ever dropped."""
        if self.capacity is None:
            return ()
        device = device or self.router_weight.device
        return SwitchState(torch.zeros(batch_size, self.n_experts, device=device, dtype=torch.long))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`: each token costs the router and one expert."""
        D, E, H = self.d_model, self.n_experts, self.hidden
        flops = length * (2 * D * E + 2 * 2 * D * H)
        return Cost(E * (D + 2 * D * H), flops, 0 if self.capacity is None else 8 * E)


def _fresh(names: dict[str, Tensor], stem: str, ending: str) -> str:
    """The first of stem_0, stem_1, ... that no layer of this pass has used."""
    i = 0
    while f"{stem}_{i}_{ending}" in names:
        i += 1
    return f"{stem}_{i}"
