"""Faults of the kinds that real libraries shipped: one replaced line each.

A fault with a `mixer` must be caught by the contract; one with `tests` by those tests.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in `file`, becomes `new`."""

    what: str
    file: str
    old: str
    new: str
    mixer: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    tests: tuple[str, ...] = ()


SCAN = "kernels/scan/__init__.py"
RG_LRU = "layers/rg_lru.py"
CONV = "kernels/short_conv/chunked.py"
SELECTIVE = "kernels/selective_scan/chunked.py"
MAMBA = "layers/mamba.py"

FAULTS = (
    Fault(
        "the state is dropped between passes",
        RG_LRU,
        "initial_state=h, reset=reset",
        "initial_state=None, reset=reset",
        "rg_lru",
    ),
    Fault(
        "the mask is ignored",
        SCAN,
        "if mask is not None:",
        "if False:",
        "rg_lru",
    ),
    Fault(
        "padding decays the state",
        SCAN,
        "torch.where(mask[..., None], a, 1)",
        "a",
        "rg_lru",
    ),
    Fault(
        "resets are ignored",
        SCAN,
        "if reset is not None:",
        "if False:",
        "rg_lru",
    ),
    Fault(
        "the initial state is rounded to bfloat16",
        SCAN,
        "initial_state.to(wide)",
        "initial_state.bfloat16().to(wide)",
        "rg_lru",
    ),
    Fault(
        "the gradient of the decay is 1 % off",
        "kernels/scan/native.c",
        "da_t[d] = total * before[d];",
        "da_t[d] = total * before[d] * (REAL)1.01;",
        "rg_lru",
    ),
    Fault(
        "the gradient of the final state is dropped",
        "kernels/scan/native.c",
        "g[d] = dstate[row * D + first + d];",
        "g[d] = 0;",
        "rg_lru",
    ),
    Fault(
        "C and torch disagree in the last digits",
        "kernels/scan/native.c",
        "h_t[d] = a_t[d] * before[d] + b_t[d];",
        "h_t[d] = a_t[d] * before[d] + b_t[d] * (REAL)1.00001;",
        "rg_lru",
    ),
    Fault(
        "every sequence starts as if it were the middle of one",
        RG_LRU,
        "torch.where(fresh, 1, ",
        "torch.where(fresh & False, 1, ",
        tests=("tests/parity/test_rg_lru.py",),
    ),
    Fault(
        "a parameter is left out of reset_parameters",
        RG_LRU,
        "        nn.init.zeros_(self.conv_bias)\n",
        "",
        "rg_lru",
    ),
    Fault(
        "the next token leaks into the convolution",
        CONV,
        "y = torch.addcmul(y, x[:, j : j + T], column)",
        "y = torch.addcmul(y, x.roll(-1, 1)[:, j : j + T], column)",
        "mamba",
    ),
    Fault(
        "the convolution's window crosses documents",
        CONV,
        "torch.where(same[..., None], x[:, j : j + T], 0)",
        "x[:, j : j + T]",
        "mamba",
    ),
    Fault(
        "the tail holds padding",
        CONV,
        "order = order.byte().argsort(dim=1, stable=True)",
        "order = torch.arange(order.shape[1]).expand_as(order)",
        "mamba",
    ),
    Fault(
        "the tail of one document reaches the next pass",
        CONV,
        "return y, torch.where(same[..., None], x[:, T:], 0)",
        "return y, x[:, T:]",
        "mamba",
    ),
    Fault(
        "a pass of one token scales its state by 1.05",
        "kernels/selective_scan/__init__.py",
        "y, state = reference_selective_scan(u, dt, A, B, C, initial_state, reset)",
        "y, state = reference_selective_scan(u, dt, A, B, C, initial_state * 1.05, reset)",
        "mamba",
    ),
    Fault(
        "blocks of the backward pass forget what comes later",
        SELECTIVE,
        "        g[-1] += carry\n",
        "",
        "mamba",
    ),
    Fault(
        "the state is rounded to bfloat16 between blocks",
        SELECTIVE,
        "state = h[-1].clone()",
        "state = h[-1].bfloat16().to(h.dtype)",
        "mamba",
    ),
    Fault(
        "rows of the batch share one state",
        SELECTIVE,
        "state = h[-1].clone()",
        "state = h[-1].mean(0, keepdim=True).expand_as(h[-1]).clone()",
        "mamba",
    ),
    Fault(
        "A_log is kept in bfloat16",
        MAMBA,
        "A = -self.A_log.to(dt.dtype).exp()",
        "A = -self.A_log.bfloat16().to(dt.dtype).exp()",
        "mamba",
    ),
    Fault(
        "step sizes are computed in half precision under autocast",
        MAMBA,
        "return softplus(r.to(wide) + self.dt_bias.to(wide)), B, C",
        "return softplus((r + self.dt_bias).to(r.dtype).mul(1.0)).bfloat16().to(wide), B, C",
        "mamba",
    ),
    Fault(
        "the cost forgets a projection",
        MAMBA,
        "products = 3 * D * E + E * (2 * R + 2 * N)",
        "products = 2 * D * E + E * (2 * R + 2 * N)",
        "mamba",
    ),
)
