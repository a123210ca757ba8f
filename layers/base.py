"""The contract: every entry of a residual stack is a `Mixer`.

Letters, the same in the whole library: B batch, T time, D model width, H heads, K key or query size
of a head, V value size of a head, N state size, W width of a short convolution, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.tokens import take

State = tuple[Any, ...]  # a mixer's own NamedTuple of tensors, batch in dim 0; () when it has none


@dataclass(frozen=True)
class Caps:
    """What a mixer promises; one test suite reads it and holds the mixer to it.

    Attributes:
        causality: `strict`: changing the future leaves the past unchanged. `value`: no future value
            reaches the past, but hard selection (sorting, clustering, top-k) looks ahead, so
            stepping differs from training. `none`: bidirectional only.
        prefix: the output of a prefix does not depend on how long the sequence goes on.
        state: bytes carried from token to token: `constant`, `window` (bounded), `growing`, `none`.
        bidirectional: takes `causal=False`.
    """

    causality: Literal["strict", "value", "none"] = "strict"
    prefix: bool = True
    state: Literal["constant", "window", "growing", "none"] = "constant"
    bidirectional: bool = False


class Cost(NamedTuple):
    """What a mixer costs, in closed form; the suite compares it with what is measured.

    Attributes:
        parameters: number of trainable scalars.
        flops: floating-point operations of the matrix products of one forward pass over one
            sequence, two for a multiply-add, by the definition (the `reference` backend).
            Elementwise work and FFTs are not counted.
        state_bytes: bytes of one row's state after that many tokens, in float32.
    """

    parameters: int
    flops: int
    state_bytes: int


@dataclass
class Context:
    """What one pass shares with every layer. All tensors are (B, T) unless said otherwise.

    A token where `mask` is False is as if it were not there: it leaves every state untouched and
    its content reaches nobody. No state crosses from one `document` into another.

    Attributes:
        mask: True = a real token; None = all are real.
        document: ids of packed documents; a change of id from one real token to the next starts a
            document. None = the whole row is one document.
        last_document: (B,) id of the last real token before this pass; None = this pass goes on
            with the document that the state holds.
        positions: index of each token within its document; None = mixers count real tokens.
        token_ids: the vocabulary ids of the tokens.
        shared: what layers hand to later layers within the pass.
        losses: auxiliary losses by name, added to the training loss.
        stats: numbers worth logging, by name.
        reversed: the pass is read from its end; what such passes share is in that order.
    """

    mask: Tensor | None = None
    document: Tensor | None = None
    last_document: Tensor | None = None
    positions: Tensor | None = None
    token_ids: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    reversed: bool = False

    @property
    def reset(self) -> Tensor | None:
        """(B, T), True at each real token that begins another document than the one before it."""
        if self.document is None:
            return None
        document, mask = self.document, self.mask
        B, T = document.shape
        before = document[:, :1] if self.last_document is None else self.last_document[:, None]
        if mask is None:
            return document != torch.cat([before, document], dim=1)[:, :T]
        if T == 0:
            return mask
        # Masked ids are junk: compare each real token with the latest real one before it.
        slots = torch.arange(1, T + 1, device=document.device).expand(B, T)
        latest = torch.where(mask, slots, 0).cummax(dim=1).values  # 0: none yet
        earlier = torch.cat([torch.zeros_like(latest[:, :1]), latest], dim=1)[:, :T]
        if self.last_document is None:
            first = torch.where(mask, slots, T).min(dim=1, keepdim=True).values - 1
            before = document.gather(1, first)
        return mask & (document != torch.cat([before, document], dim=1).gather(1, earlier))

    def index(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Index of each token within its document, counted in real tokens, from 0.

        Args:
            x: (B, T, ...), for its shape and device.
            start: (B,) index of the first token when it goes on with a document; 0 when None.

        Returns:
            (B, T) int64. At a masked token: the index that the next real one gets.
        """
        if self.positions is not None:
            return self.positions
        B, T = x.shape[:2]
        if self.mask is None:
            count = torch.arange(T, device=x.device).expand(B, T)
        else:
            count = self.mask.long().cumsum(1) - self.mask.long()
        offset = torch.zeros_like(count[:, :1]) if start is None else start[:, None]
        reset = self.reset
        if reset is None or T == 0:
            return count + offset
        begun = torch.where(reset, count, -1).cummax(dim=1).values
        return torch.where(begun < 0, count + offset, count - begun)

    def next_index(self, index: Tensor, start: Tensor | None = None) -> Tensor:
        """(B,) the index that the token after this pass has, given `index(x, start)`."""
        if index.shape[1] == 0:
            return torch.zeros_like(index.sum(1)) if start is None else start
        if self.mask is None:
            return index[:, -1] + 1
        return index[:, -1] + self.mask[:, -1].long()

    def flipped(self) -> "Context":
        """The same pass read from the end; losses, stats and shared values stay the same dicts."""
        turn = [
            None if x is None else x.flip(1)
            for x in (self.mask, self.document, self.positions, self.token_ids)
        ]
        mask, document, positions, token_ids = turn
        return replace(
            self,
            mask=mask,
            document=document,
            last_document=None,
            positions=positions,
            token_ids=token_ids,
            reversed=not self.reversed,
        )


class Mixer(nn.Module):
    """(B, T, D) -> (B, T, D). The law: mixing [a; b] is mixing a, then b from a's state.

    A subclass gives `caps`, `paper`, `kernel`, a constructor `(d_model, *, options...)`, `forward`,
    `init_state` when it has a state, `reset_parameters` and `cost`.

    Attributes:
        caps: what it promises; set again in the constructor where an option decides.
        kind: what it mixes: tokens (`sequence`) or the channels of each token (`channel`).
        paper: arXiv id.
        kernel: the kernel it is built around; empty when it needs none.
        variants: sets of options that the contract suite holds it to, besides the defaults.
        ssm_parameters: names of its parameters that train at a lower rate without weight decay.
    """

    caps = Caps()
    kind: ClassVar[Literal["sequence", "channel"]] = "sequence"
    paper: ClassVar[str] = ""
    kernel: ClassVar[str] = ""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    ssm_parameters: ClassVar[tuple[str, ...]] = ()
    d_model: int

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix a pass.

        Args:
            x: (B, T, D), any T >= 0.
            state: where the pass before left off; None starts afresh and asks for none back.
            ctx: what the pass shares; None is a pass of one unpadded document a row.

        Returns:
            y: (B, T, D). At masked tokens it means nothing.
            state: the new state, or None when none was given.
        """
        raise NotImplementedError

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token; () for a mixer without one.

        Args:
            batch_size: rows.
            device: the parameters' device when None.
            dtype: the parameters' dtype when None. Sums and recurrent states are float32 even when
                this is a half-precision dtype.
        """
        return ()

    def reset_parameters(self) -> None:
        """Initialise every parameter and every non-persistent buffer that this module owns.

        Child modules that have a `reset_parameters` of their own are not touched.
        """

    def cost(self, length: int) -> Cost:
        """Parameters, FLOPs and state bytes for one sequence of `length` tokens."""
        raise NotImplementedError

    def zeros(
        self, *shape: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Tensor:
        """A zero tensor for a recurrent state: float32, or wider where the parameters are."""
        like = next(self.parameters())
        wide = accumulator(dtype or like.dtype)
        return torch.zeros(shape, device=device or like.device, dtype=wide)


class Seen(NamedTuple):
    """State of a mixer that recomputes: every input so far; (B, S, D) and (B, S)."""

    x: Tensor
    mask: Tensor
    document: Tensor


class Recompute(Mixer):
    """A causal mixer without a cheap step: it keeps the inputs seen and mixes them again.

    A subclass gives `mix`; masks never reach it. O(S) memory, and each pass costs as much as the
    whole sequence so far: correct first, override `forward` where the paper has a recurrence.
    """

    caps = Caps(state="growing")

    def mix(self, x: Tensor, document: Tensor | None) -> Tensor:
        """Mix whole sequences, (B, S, D) -> (B, S, D); no state crosses `document` (B, S) borders.

        Rows may end in junk, which a causal mixer's real outputs do not see.
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        if state is None and ctx.mask is None:
            return self.mix(x, ctx.document), None
        B, T = x.shape[:2]
        given = Seen(*(state if state is not None else self.init_state(B, device=x.device)))
        mask = x.new_ones(B, T, dtype=torch.bool) if ctx.mask is None else ctx.mask
        reset = ctx.reset
        document = torch.zeros_like(mask, dtype=torch.long) if reset is None else reset.cumsum(1)
        if given.document.shape[1]:
            document = document + given.document.amax(1, keepdim=True)
        seen = Seen(
            torch.cat([given.x.to(x.dtype), torch.where(mask[..., None], x, 0)], dim=1),
            torch.cat([given.mask, mask], dim=1),
            torch.cat([given.document, document], dim=1),
        )
        # Real tokens first, in order: what is masked becomes junk behind the end of the row.
        order = (~seen.mask).to(torch.int8).argsort(dim=1, stable=True)
        ids = seen.document.gather(1, order)
        packed = None if ctx.document is None and state is None else ids
        y = self.mix(take(seen.x, order), packed)
        y = take(y, order.argsort(dim=1))[:, seen.x.shape[1] - T :]
        return y, None if state is None else seen

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Seen:
        """Nothing seen."""
        like = next(self.parameters())
        device = device or like.device
        return Seen(
            torch.zeros(batch_size, 0, self.d_model, device=device, dtype=dtype or like.dtype),
            torch.zeros(batch_size, 0, device=device, dtype=torch.bool),
            torch.zeros(batch_size, 0, device=device, dtype=torch.long),
        )


class Bidirectional(Mixer):
    """y = m(x) + reverse(m'(reverse(x))): two copies of a strict mixer, one reading each way."""

    caps = Caps(causality="none", prefix=False, state="none", bidirectional=True)

    def __init__(self, build: Callable[[], Mixer]) -> None:
        super().__init__()
        self.forth, self.back = build(), build()
        if self.forth.caps.causality != "strict":
            name, causality = type(self.forth).__name__, self.forth.caps.causality
            raise ValueError(
                f"Bidirectional needs a strictly causal mixer; {name} is declared {causality!r}"
            )
        self.d_model = self.forth.d_model

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`; a bidirectional pass takes no state."""
        if state:
            raise ValueError("a bidirectional mixer has no state to go on from; pass state=None")
        ctx = ctx or Context()
        forth = self.forth(x, None, ctx)[0]
        back = self.back(x.flip(1), None, ctx.flipped())[0].flip(1)
        return forth + back, state

    def cost(self, length: int) -> Cost:
        """Twice the parameters and FLOPs of one direction, and no state."""
        one = self.forth.cost(length)
        return Cost(2 * one.parameters, 2 * one.flops, 0)


def check_context(ctx: Context, x: Tensor) -> None:
    """Refuse a context whose (B, T) tensors do not fit `x`, by name."""
    for name in ("mask", "document", "positions", "token_ids"):
        value = getattr(ctx, name)
        if value is not None:
            check_shape(name, value.shape, tuple(x.shape[:2]), "(B, T)")
