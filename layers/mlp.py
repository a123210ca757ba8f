"""The feed-forward layers of transformers: a plain one and the gated SwiGLU.

    MLP: y = W_down act(W_up x)
    SwiGLU: y = W_down (silu(W_gate x) * W_up x); GeGLU with gelu for silu

Token by token, no state. Vaswani et al., 2017, arXiv:1706.03762, section 3.3; squared ReLU: So et
al., 2021, arXiv:2109.08668; SwiGLU: Shazeer, 2020, arXiv:2002.05202, equation 6.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "relu": relu,
    "relu2": relu2,
    "silu": silu,
}


class MLP(Mixer):
    """Two-layer feed-forward network of every token.

    Args:
        d_model: width D.
        expand: hidden width as a multiple of D.
        hidden: hidden width; from `expand` when None.
        activation: `gelu` (exact), `relu`, `relu2` or `silu`.
        bias: biases in both projections.
        dropout: of the hidden units, in training.
    """

    caps = Caps(state="none")
    kind = "channel"
    paper = "arXiv:1706.03762"
    variants = ({"activation": "relu2", "bias": False, "hidden": 24},)

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 4,
        hidden: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.d_model, self.hidden = d_model, hidden_width(d_model, expand, hidden, 1)
        check_activation("mlp", activation)
        check_dropout(dropout)
        self.activation = activation
        self.up_proj = nn.Linear(d_model, self.hidden, bias=bias)
        self.down_proj = nn.Linear(self.hidden, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        h = ACTIVATIONS[self.activation](self.up_proj(x))
        return self.down_proj(self.dropout(h)), state

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        return linear_cost(length, self.up_proj, self.down_proj)


class SwiGLU(Mixer):
    """Gated feed-forward network of every token.

    Args:
        d_model: width D.
        expand: hidden width as a multiple of D, rounded up to a multiple of 8; at 8/3 the three
            matrices weigh as much as the two of an `mlp`.
        hidden: hidden width; from `expand` when None.
        activation: of the gate: `silu`, `gelu` (which makes it GeGLU), `relu` or `relu2`.
        bias: biases in the three projections.
        dropout: of the hidden units, in training.
    """

    caps = Caps(state="none")
    kind = "channel"
    paper = "arXiv:2002.05202"
    variants = ({"hidden": 20, "bias": True, "activation": "gelu"},)

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 8 / 3,
        hidden: int | None = None,
        activation: str = "silu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.d_model, self.hidden = d_model, hidden_width(d_model, expand, hidden, 8)
        check_activation("swiglu", activation)
        check_dropout(dropout)
        self.activation = activation
        self.gate_proj = nn.Linear(d_model, self.hidden, bias=bias)
        self.up_proj = nn.Linear(d_model, self.hidden, bias=bias)
        self.down_proj = nn.Linear(self.hidden, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        h = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.dropout(h)), state

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        return linear_cost(length, self.gate_proj, self.up_proj, self.down_proj)


def hidden_width(d_model: int, expand: float, hidden: int | None, multiple: int) -> int:
    """`hidden`, or `expand` times the width rounded up to a multiple."""
    check_positive(d_model=d_model, expand=expand)
    if hidden is not None:
        check_positive(hidden=hidden)
        return hidden
    # Rounded first: 8/3 of 96 must be 256 whatever the last bit of 8/3 is.
    return multiple * max(1, -int(-round(expand * d_model, 6) // multiple))


def check_activation(mixer: str, activation: str) -> None:
    """Refuse a name that is not in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise unknown(f"activation of {mixer} named", activation, ACTIVATIONS)


def check_dropout(dropout: float) -> None:
    """Refuse a probability outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is not allowed; it must be in [0, 1)")


def linear_cost(length: int, *layers: nn.Linear) -> Cost:
    """Cost of a stateless mixer made of projections."""
    parameters = sum(p.numel() for layer in layers for p in layer.parameters())
    flops = sum(2 * length * layer.weight.numel() for layer in layers)
    return Cost(parameters, flops, 0)
