"""The residual stream: each entry adds to it what its mixer makes of its norm."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from seqzoo.layers.base import Context, State
from seqzoo.zoo.seeds import derive, seeded
from seqzoo.zoo.spec import DecoderSpec, EntrySpec


class Added(NamedTuple):
    """What an entry returns: the stream, its state, and what it left in its context."""

    x: Tensor
    state: State | None
    shared: dict[str, Tensor]
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Entry(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """x + dropout(mixer(norm(x))).

    The mixer gets a context of its own, and what it leaves there is returned: the entry is a
    function, so computing it a second time for gradient checkpointing sees what it saw at first.

    Args:
        spec: the decoder.
        entry: what stands here.
        seed: of this entry's own random stream.
    """

    def __init__(self, spec: DecoderSpec, entry: EntrySpec, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.norm = make_norm(spec)
            self.mixer = spec.build(entry)
        self.dropout = nn.Dropout(spec.dropout)
        for place, module in enumerate(self.modules()):
            module.init_seed = derive(seed, place)  # type: ignore[assignment]  # a plain integer

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> Added:
        """One entry.

        Args:
            x: the stream, (B, T, D).
            state: of the mixer; None asks for none.
            ctx: of the pass; it is not changed.

        Returns:
            The stream, (B, T, D), and what `Added` names.
        """
        own = replace(ctx, shared=dict(ctx.shared), losses={}, stats={})
        y, state = self.mixer(self.norm(x), state, own)
        return Added(x + self.dropout(y), state, own.shared, own.losses, own.stats)


def make_norm(spec: DecoderSpec) -> nn.Module:
    """The norm that a decoder asks for."""
    kind = nn.RMSNorm if spec.norm == "rmsnorm" else nn.LayerNorm
    return kind(spec.d_model, eps=spec.norm_eps)
