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
CONV_C = "kernels/short_conv/native.c"
SELECTIVE = "kernels/selective_scan/chunked.py"
MAMBA = "layers/mamba.py"
ATTENTION = "layers/attention.py"
DECAY = "kernels/decay/__init__.py"
CHUNKS = "kernels/decay/chunked.py"
DECAY_C = "kernels/decay/native.c"
SWITCH = "layers/switch.py"
MAXPLUS = "kernels/maxplus/__init__.py"
PERFORMER = "layers/performer.py"
DROPPING = {"max_length": 40, "n_experts": 4, "capacity_factor": 0.5, "hidden": 20}

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
        CONV_C,
        "for (i64 j = 1; j < W; j++) row[j - 1] = reset && reset[b * T + t] ? zeros : row[j];",
        "for (i64 j = 1; j < W; j++) row[j - 1] = row[j];",
        "mamba",
    ),
    Fault(
        "the tail holds padding",
        CONV_C,
        "copy(zeros, y + at, n);",
        "copy(row[W - 1] = zeros, y + at, n);",
        "mamba",
    ),
    Fault(
        "the tail of one document reaches the next pass",
        CONV_C,
        "copy(row[j], tail + past",
        "copy(T < W ? row[j] : x + (b * T + T - W + j) * D + first, tail + past",
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
    Fault(
        "the cache keeps the keys of documents that ended",
        ATTENTION,
        "mask = mask & (document == document[:, -1:])",
        "mask = mask.clone()",
        "attention",
    ),
    Fault(
        "padding takes up positions",
        ATTENTION,
        "index = ctx.index(x, past.next)",
        "index = past.next[:, None] + torch.arange(T)",
        "attention",
        {"position": "rope"},
    ),
    Fault(
        "a window sees one token more than its cache holds",
        ATTENTION,
        "            window=self.window,\n",
        "            window=self.window and self.window + 1,\n",
        "attention",
        {"window": 8},
    ),
    Fault(
        "padding is remembered",
        DECAY,
        "k = torch.where(mask[..., None, None], k, 0)",
        "pass",
        "gla",
    ),
    Fault(
        "padding forgets",
        DECAY,
        "g = torch.where(mask[..., None, None], g, 0)",
        "pass",
        "gla",
    ),
    Fault(
        "a document remembers the one before",
        DECAY,
        "g = torch.where(reset[..., None, None], -torch.inf, g)",
        "pass",
        "mamba2",
    ),
    Fault(
        "sums of log decays come out short",
        "kernels/decay/weights.c",
        "sum += load(s->g + at);",
        "sum += load(s->g + at) * (REAL)0.996;",
        "gla",
    ),
    Fault(
        "the gradient of a chunk's whole decay is dropped",
        DECAY_C,
        "store(sum * load(s->total + c), s->dtotal + c);",
        "store(sum * 0, s->dtotal + c);",
        "mamba2",
    ),
    Fault(
        "a single step reads its state 5 % too large",
        CHUNKS,
        "o = q[:, :, None] @ (state if before else new)",
        "o = q[:, :, None] @ (state if before else new) * 1.05",
        "gla",
    ),
    Fault(
        "the long convolution is circular",
        "kernels/long_conv/native.py",
        "(T + L - 2).bit_length()",
        "(T - 1).bit_length()",
        "hyena",
    ),
    Fault(
        "a state-space model starts every pass from nothing",
        "layers/linear_system.py",
        "initial_state=start, reset=reset",
        "initial_state=None, reset=reset",
        "s4d",
    ),
    Fault(
        "an initial frequency is off",
        "layers/s4d.py",
        "return math.pi * torch.arange(n_states // 2",
        "return 3.0 * torch.arange(n_states // 2",
        tests=("tests/parity/test_s4d.py",),
    ),
    Fault(
        "token shift shows the token itself",
        "layers/token_shift.py",
        "torch.eye(2, device=x.device, dtype=x.dtype)[0]",
        "torch.eye(2, device=x.device, dtype=x.dtype)[1]",
        tests=("tests/parity/test_channel.py",),
    ),
    Fault(
        "padding takes up the capacity of experts",
        SWITCH,
        "chosen = chosen * ctx.mask[..., None]",
        "pass",
        "switch",
        DROPPING,
    ),
    Fault(
        "late tokens drive early ones out of their expert",
        SWITCH,
        "taken = chosen * (place < self.capacity)",
        "taken = chosen * (chosen.sum(1, keepdim=True) - place <= self.capacity)",
        "switch",
        DROPPING,
    ),
    Fault(
        "the router computes in the dtype of autocast",
        SWITCH,
        "with full_precision(x):",
        "if True:",
        tests=("tests/parity/test_channel.py",),
    ),
    Fault(
        "what a token reads of the state has decayed at that token already",
        "kernels/delta_lowrank/chunked.py",
        "A * _since_before(decays)",
        "A * decays.since",
        "rwkv7",
    ),
    Fault(
        "a reset comes before a token's last step instead of its first",
        "kernels/delta/product.py",
        "_at(0, reset, n)",
        "_at(n - 1, reset, n)",
        "gated_deltaproduct",
    ),
    Fault(
        "the running maximum starts anew with every pass",
        "layers/mlstm.py",
        "C, m = cell if cell is not None else",
        "C, m = (cell.C, cell.m * 0) if cell is not None else",
        "mlstm",
    ),
    Fault(
        "what the last token of a pass writes late is lost",
        "layers/mamba3.py",
        "S = given.S + first[:, 0, :, None, None] * given.k[..., None] * given.x[:, :, None]",
        "S = given.S",
        "mamba3",
    ),
    Fault(
        "a mini-batch that ends with a single step is not learned from",
        "kernels/ttt/__init__.py",
        "= step(*inputs, state, slot == mini_batch - 1,",
        "= step(*inputs, state, slot == mini_batch,",
        "ttt_linear",
        {"n_heads": 2, "mini_batch": 5, "base_lr": 0.5},  # single steps end no longer one
    ),
    Fault(
        "beams keep each other's states",
        "zoo/cache.py",
        "self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))",
        "pass",
        tests=("tests/zoo/test_generation.py",),
    ),
    Fault(
        "the cache forgets which document it is in",
        "zoo/model.py",
        "cache.seen + x.shape[1], last_document(ctx)",
        "cache.seen + x.shape[1], None",
        tests=("tests/zoo/test_generation.py", "-k", "packed_documents or remembers_documents"),
    ),
    Fault(
        "buffers that no checkpoint holds come back as garbage",
        "zoo/base.py",
        "                reset()\n",
        "                pass\n",
        tests=("tests/zoo/test_model.py", "-k", "reloaded"),
    ),
    Fault(
        "loading initialises what was loaded",
        "zoo/base.py",
        "            x.copy_(value)",
        "            pass",
        tests=("tests/zoo/test_model.py", "-k", "missing_parameter or reloaded"),
    ),
    Fault(
        "exponents of keys are shifted by the largest of those to come",
        PERFORMER,
        "    largest = k.amax(-1)\n",
        "    largest = k.amax(-1).flip(1).cummax(1).values.flip(1)\n",
        tests=("tests/parity/test_performer.py",),
    ),
    Fault(
        "rounding of the running maximum decays what is carried over",
        MAXPLUS,
        "carried = log_write < m",
        "carried = log_write > m",
        tests=("tests/kernels/test_maxplus.py",),
    ),
    Fault(
        "an export does not notice a flipped bit",
        "zoo/export.py",
        "def _digest(file: Path) -> str:",
        "def _digest(file: Path) -> str:\n    return file.name\n\n\ndef _off(file: Path) -> str:",
        tests=("tests/zoo/test_export.py::test_verify_finds_every_kind_of_change",),
    ),
    Fault(
        "the random state of torch is not restored",
        "train/resume.py",
        '    torch.set_rng_state(state["torch"].cpu())\n',
        "",
        tests=("tests/train/test_resume.py", "-k", "comes_back_whole"),
    ),
    Fault(
        "a truncated checkpoint is trusted",
        "train/checkpoint.py",
        "def damage(path: Path) -> str:",
        'def damage(path: Path) -> str:\n    return ""\n\n\ndef _unused(path: Path) -> str:',
        tests=("tests/train/test_checkpoint.py",),
    ),
)
