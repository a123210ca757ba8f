"""Hyena: a long convolution with an implicit filter between elementwise gates.

    (x^1, ..., x^N, v) = conv3(W_in u),  v <- x^n * (h^n conv v + b^n v) for n = 2 ... N
    y = W_o (x^1 * v),  with each v gated before it is convolved
    h_t = MLP(features(t / max_length)) * (exp(-decay t / max_length) + shift), sines in between

O(T log T) time. There is no small state: streaming keeps the inputs and convolves them again. Poli
et al., 2023, arXiv:2302.10866, sections 3.2 and 3.3. As in the authors' code (HazyResearch/safari
07fba79, standalone_hyena.py), an operator of order N has N gates and N - 1 long filters: the first
filter of the paper is the short convolution alone; and filters belong to positions over a fixed
`max_length`, so a prefix does not depend on how the sequence goes on. Here positions are not
learned.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Cost, Recompute

TAPS = 3  # of the short convolution
TARGET = (
    1e-2  # what the window has decayed to after a part `fast_decay` or `slow_decay` of the table
)


class Hyena(Recompute):
    """Gated long convolutions whose filters are a sine network of the position.

    Set `max_length` near the longest sequence in use: filters vary on its scale, and over a small
    part of it they are nearly exponentials.

    Args:
        d_model: width D.
        order: number N of gates, at least 2.
        max_length: positions of the filter; longer sequences are refused.
        filter_order: width of the network.
        filter_layers: hidden layers of the network after the first.
        n_bands: frequencies of the positional features, which are t, cosines and sines.
        frequency: of the sines at the start; learned.
        fast_decay: part of `max_length` in which the fastest channel's window falls to 1 %.
        slow_decay: the same of the slowest channel.
        shift: what the window decays to, so that no part of a filter is cut off.
        bias: biases in the two projections.
    """

    paper = "arXiv:2302.10866"
    kernel = "long_conv"
    variants = ({"order": 3, "shift": 0.05, "bias": False},)

    def __init__(
        self,
        d_model: int,
        *,
        order: int = 2,
        max_length: int = 65_536,
        filter_order: int = 64,
        filter_layers: int = 2,
        n_bands: int = 16,
        frequency: float = 14.0,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        shift: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, filter_order=filter_order, n_bands=n_bands)
        check_positive(fast_decay=fast_decay, slow_decay=slow_decay)
        for name, value, least in (
            ("order", order, 2),
            ("max_length", max_length, 2),
            ("filter_layers", filter_layers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is not allowed; it must be at least {least}")
        self.d_model, self.order, self.max_length = d_model, order, max_length
        self.n_bands, self.initial_frequency = n_bands, frequency
        self.fast_decay, self.slow_decay, self.shift = fast_decay, slow_decay, shift
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty((order + 1) * d_model, TAPS))
        self.conv_bias = nn.Parameter(torch.empty((order + 1) * d_model))
        sizes = [2 * n_bands + 1, *[filter_order] * (filter_layers + 1), (order - 1) * d_model]
        # Not nn.Linear: half precision could not tell one of 65,536 positions from the next.
        self.filter_weights = nn.ParameterList(
            nn.Parameter(torch.empty(n, m)) for m, n in pairwise(sizes)
        )
        self.filter_biases = nn.ParameterList(nn.Parameter(torch.empty(n)) for n in sizes[1:-1])
        self.frequency = nn.Parameter(torch.empty(filter_order))
        self.skip = nn.Parameter(torch.empty(order - 1, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in 1 / sqrt(inputs) for network and short convolution, a normal skip."""
        for weight in self.filter_weights:
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        for weight, bias in zip(self.filter_weights, self.filter_biases, strict=False):
            nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        for parameter in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(parameter, -(TAPS**-0.5), TAPS**-0.5)
        nn.init.constant_(self.frequency, self.initial_frequency)
        nn.init.normal_(self.skip)

    def mix(self, x: Tensor, document: Tensor | None) -> Tensor:
        """See `Recompute.mix`.

        Raises:
            ValueError: the sequence is longer than `max_length`.
        """
        length, longest = x.shape[1], self.max_length
        if length > longest:
            raise ValueError(
                f"{length} tokens do not fit the filters of max_length={longest}; "
                f"build the mixer with max_length={length} or more"
            )
        reset = None
        if document is not None:
            reset = pad(document[:, 1:] != document[:, :-1], (min(length, 1), 0))
        mixed, _ = short_conv(self.in_proj(x), self.conv_weight, self.conv_bias, reset=reset)
        *gates, v = mixed.chunk(self.order + 1, dim=-1)
        filters = self.filters(length, accumulator(x.dtype))
        for n, gate in enumerate(reversed(gates[1:])):
            v = long_conv(v * gate, filters[n], skip=self.skip[n], document=document)
        out: Tensor = self.out_proj(gates[0] * v)
        return out

    def filters(self, length: int, dtype: torch.dtype) -> Tensor:
        """(N - 1, D, length) in `dtype`; at least one position.

        In float64 inside: each sine of frequency 14 makes earlier rounding errors 14 times larger.
        """
        real, device = torch.float64, self.skip.device
        slots = torch.arange(max(length, 1), dtype=real, device=device)[:, None]
        t = slots / (self.max_length - 1)
        bands = torch.linspace(1e-4, self.n_bands - 1, self.n_bands, dtype=real, device=device)
        angle = bands * 2 * math.pi * slots / self.max_length
        h = torch.cat([t, angle.cos(), -angle.sin()], dim=1)
        weights = [weight.double() for weight in self.filter_weights]
        with full_precision(h):
            for weight, bias in zip(weights, self.filter_biases, strict=False):
                h = torch.sin(self.frequency.double() * linear(h, weight, bias.double()))
            h = linear(h, weights[-1])
        slow, fast = (-math.log(TARGET) / part for part in (self.slow_decay, self.fast_decay))
        decay = torch.linspace(slow, fast, h.shape[1], dtype=real, device=device)
        h = h * (torch.exp(-t * decay) + self.shift)
        return torch.unflatten(h.t(), 0, (self.order - 1, self.d_model)).to(dtype)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; products are those of the projections and of the filters' network."""
        D, N = self.d_model, self.order
        parameters = sum(p.numel() for p in self.parameters())
        network = sum(weight.numel() for weight in self.filter_weights)
        flops = 2 * length * D * D * (N + 2) + 2 * max(length, 1) * network
        return Cost(parameters, flops, length * (4 * D + 1 + 8))
