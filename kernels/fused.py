"""What the Triton kernels share: how the ways in which one is compiled are written down.

Each `fused.py` lists them in KERNELS, so that a machine without a GPU can compile every one ahead
of time and read registers, spills and shared memory.
"""

from typing import Any, NamedTuple

OPTIONS = {"enable_fp_fusion": True}  # of every launch: Triton 3.10 turns the default around


class Variant(NamedTuple):
    """One way in which a kernel is compiled.

    Attributes:
        kernel: the `@triton.jit` function.
        types: the type of each run-time argument, by name: `*fp32`, `*bf16`, `i32`.
        config: what a launch gives by keyword: `tl.constexpr` arguments and compiler options.
        aligned: whether the integers are multiples of 16, as Triton specialises them. Pointers are.
        matrix: whether its dots must become matrix instructions.
    """

    kernel: Any
    types: dict[str, str]
    config: dict[str, Any]
    aligned: bool = True
    matrix: bool = False
