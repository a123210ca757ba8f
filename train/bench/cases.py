"""The comparisons: which kernel, with what, at how many tokens, and the goal."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from seqzoo.train.bench import gpu_peers as gpu
from seqzoo.train.bench import peers
from seqzoo.train.bench.operations import FORMS, OPERATIONS, Operation, Run


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        kernel: name in `OPERATIONS`.
        other: what it is compared with, in words.
        load: the other computation, on the same inputs; None: the kernel itself at a quarter of the
            length.
        tokens: the length for which the goal is set.
        faster: the goal: at least so many times as fast as the other; or
        slower: the goal: at most so many times its time.
        backward: forward and backward, or forward alone.
        short: the length measured unless the full one is asked for, where the other takes minutes.
        form: name in `FORMS` of another use of the kernel.
        on: the kind of device the row and its goal are for.
    """

    kernel: str
    other: str
    load: Callable[[], Run] | None
    tokens: int
    faster: float = 0
    slower: float = 0
    backward: bool = True
    short: int = 0
    form: str = ""
    on: str = "cpu"

    @property
    def operation(self) -> Operation:
        """What is measured."""
        return FORMS[self.form] if self.form else OPERATIONS[self.kernel]

    @property
    def name(self) -> str:
        """The kernel, and which use of it."""
        return f"{self.kernel}, {self.form}" if self.form else self.kernel


SLOW = "transformers, loop over tokens"
MAMBAPY = "mambapy, parallel scan"
ITSELF = "itself, a quarter as long"
CASES = (
    Case(
        "selective_scan",
        SLOW,
        peers.transformers_selective_scan,
        4096,
        faster=100,
        backward=False,
    ),
    Case(
        "selective_scan",
        SLOW,
        peers.transformers_selective_scan,
        1024,
        faster=50,
        backward=False,
    ),
    Case("selective_scan", SLOW, peers.transformers_selective_scan, 1024, faster=1000, short=256),
    Case(
        "selective_scan",
        MAMBAPY,
        peers.mambapy_selective_scan,
        1024,
        faster=40,
        backward=False,
    ),
    Case("selective_scan", MAMBAPY, peers.mambapy_selective_scan, 1024, faster=30),
    Case(
        "selective_scan",
        MAMBAPY,
        peers.mambapy_selective_scan,
        1024,
        faster=4,
        form="no compiler",
    ),
    Case("scan", "torch.add of its inputs", peers.add, 4096, slower=1.25, backward=False),
    Case("scan", "torch.add of its inputs", peers.add, 4096, slower=6),
    Case("wkv", SLOW, peers.transformers_wkv, 4096, faster=500, short=1024),
    Case("short_conv", "conv1d of transposed", peers.conv1d_transposed, 4096, faster=7),
    Case("decay", "transformers, Mamba-2 in chunks", peers.transformers_mamba2, 4096, faster=4),
    *(
        Case("decay", "causal SDPA", peers.causal_sdpa, 4096, faster=5, form=form)
        for form in ("linear attention", "Mamba-2", "GLA")
    ),
    Case("delta", "fla, PyTorch in chunks", peers.fla_delta, 4096, faster=10),
    Case("delta", "causal SDPA", peers.causal_sdpa, 4096, faster=3),
    *(
        Case("delta", "causal SDPA", peers.causal_sdpa, 4096, faster=3, form=form)
        for form in ("Gated DeltaNet", "KDA")
    ),
    Case("long_conv", "one FFT of everything", peers.whole_fft, 4096, faster=2),
    Case("attention", "full masked SDPA", peers.masked_sdpa, 4096, faster=10, backward=False),
    *(
        Case(kernel, ITSELF, None, 4096, slower=8)
        for kernel in ("scan", "selective_scan", "wkv", "short_conv", "long_conv", "attention")
    ),
    *(
        Case(kernel, ITSELF, None, tokens, slower=5, form=form)
        for kernel, form in (
            ("decay", "Mamba-2"),
            ("decay", "GLA"),
            ("delta", ""),
            ("delta", "KDA"),
            ("delta_lowrank", ""),
        )
        for tokens in (4096, 16_384)
    ),
)
# On a GPU: batch 8, width 2048 or 16 heads of 128, bfloat16 inputs (parameters in float32).
GPU_CASES = tuple(
    replace(case, on="cuda", backward=backward)
    for case in (
        Case("selective_scan", "mamba-ssm", gpu.selective_scan, 4096, faster=1.5),
        Case("scan", "fla, chunk_hgrn", gpu.hgrn, 4096, faster=8),
        Case("wkv", "fla, fused_recurrent_rwkv4", gpu.rwkv4, 4096, faster=1),
        Case("short_conv", "causal-conv1d", gpu.causal_conv1d, 4096, faster=1),
        Case("decay", "mamba-ssm, SSD", gpu.ssd, 4096, faster=3),
        Case("decay", "fla, chunk_simple_gla", gpu.simple_gla, 4096, faster=3, form="Mamba-2"),
        Case("decay", "fla, chunk_gla", gpu.gla, 4096, faster=3, form="GLA"),
        Case("decay", "causal SDPA", peers.causal_sdpa, 2048, faster=1, form="GLA"),
        Case("delta", "fla, chunk_delta_rule", gpu.delta_rule, 4096, faster=1),
        Case(
            "delta",
            "fla, chunk_gated_delta_rule",
            gpu.gated_delta_rule,
            4096,
            faster=1,
            form="Gated DeltaNet",
        ),
        Case("delta", "fla, chunk_kda", gpu.kda, 4096, faster=1, form="KDA"),
        Case("delta_lowrank", "fla, chunk_dplr_delta_rule", gpu.lowrank, 4096, faster=1),
        Case("long_conv", "one FFT of everything", peers.whole_fft, 8192, faster=1),
        Case("attention", "causal SDPA", peers.causal_sdpa, 32_768, faster=25),
    )
    for backward in (False, True)
)
