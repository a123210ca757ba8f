"""What a newcomer waits for: the import, and the first call of each native kernel.

Each in a fresh process with an empty cache, so that the compiler runs.
"""

import os
import statistics
import subprocess
import sys
import tempfile

import torch

from seqzoo.kernels.dispatch import BACKENDS
from seqzoo.train.bench.compare import Row
from seqzoo.train.bench.operations import OPERATIONS

IMPORT = "import time, torch; start = time.perf_counter(); import seqzoo"
CALL = """
import time, torch
from seqzoo.train.bench.operations import OPERATIONS, SIZES
torch.set_num_threads(1)
make, run = OPERATIONS[{kernel!r}]
inputs = make(64, SIZES["cpu"])
start = time.perf_counter()
run(inputs)
"""
TELL = "\nprint(time.perf_counter() - start)"


def starts(kernels: list[str], *, repeats: int = 3) -> list[Row]:
    """Rows for the import after torch's, and for those of the kernels that have C code."""
    rows = [_row("seqzoo", "import", "after torch", IMPORT, 0.3, repeats)]
    for kernel in kernels:
        native = next((b for b in BACKENDS[kernel] if b.name == "native"), None)
        if native is None:
            continue
        reason = native.refusal("cpu", torch.float32, ())
        if reason:
            rows.append(Row(kernel, "first call", None, 0.0, "-", note=f"not native: {reason}"))
            continue
        code = CALL.format(kernel=kernel)
        rows.append(_row(kernel, "first call", "compiler included", code, 0.5, repeats))
    return rows


def native_kernels() -> list[str]:
    """Those with C code."""
    return [k for k in OPERATIONS if any(b.name == "native" for b in BACKENDS[k])]


def _row(kernel: str, what: str, other: str, code: str, most: float, repeats: int) -> Row:
    seconds = statistics.median(_measure(code) for _ in range(repeats))
    words = f"{seconds:.2f} s"
    row = Row(kernel, what, None, 1000 * seconds, other, words=words, goal=f"<= {most:g} s")
    row.met, row.runs = seconds <= most, (repeats,)
    return row


def _measure(code: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": folder, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-c", code + TELL],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)
