"""What the Triton kernels share: how their variants are written down, how long sequences are cut.

Each `fused.py` lists the ways in which its kernels are compiled in KERNELS, so that a machine
without a GPU can compile every one ahead of time and read registers, spills and shared memory.
"""

from typing import Any, NamedTuple

OPTIONS = {"enable_fp_fusion": True}  # of every launch: Triton 3.10 turns the default around
PROGRAMS = 1024  # about what the largest GPUs hold at once
LEAST = 256  # steps of a stretch
GAIN = 4  # stretches below which walking twice is not repaid


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


def stretch(length: int, programs: int, multiple: int) -> int:
    """Steps of each stretch into which sequences are cut so that they fill a GPU.

    A recurrence walks each stretch from zero, carries the states over from one to the next, and
    walks it again; where `programs` already fill the GPU, or would not even then, it is not cut.

    Args:
        length: of the sequences.
        programs: how many run when nothing is cut.
        multiple: what the answer is a multiple of, unless it is `length`.
    """
    count = min(PROGRAMS // max(programs, 1), length // LEAST)
    if count < GAIN:
        return length
    return -(-length // (count * multiple)) * multiple
