"""C kernels, compiled by the machine's own compiler on first use and called through ctypes.

A library is cached under the user's cache folder by what makes it: source, compiler, flags and the
processor (`-march=native` code must not meet another one in a shared home). It is written beside
its final name and renamed, so processes that compile at once do not see each other's halves; a
cache that cannot be written is replaced by a folder of this process.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import compiler

# -ffast-math would delete the rounding tricks that kernels rely on; contraction keeps the FMAs.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
REALS = {torch.float32: "float", torch.float64: "double"}


@cache
def build(source: str, real: str) -> ctypes.CDLL:
    """Compile C text, with REAL defined as `real`, or load it from the cache.

    Raises:
        RuntimeError: the compiler is missing or refused the source; its first words are in the
            message.
    """
    cc = compiler()
    if cc is None:
        raise RuntimeError("native kernels need a C compiler (cc, gcc or clang) on the PATH")
    flags = [*FLAGS, f"-DREAL={real}"]
    made_of = "\0".join([source, cc, *flags, _processor()])
    name = hashlib.sha256(made_of.encode()).hexdigest()[:20] + ".so"
    folder = _cache_folder()
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = _compile(cc, flags, source, Path(scratch))
            fresh.replace(target)
    return ctypes.CDLL(str(target))


def call(library: ctypes.CDLL, function: str, *arguments: Tensor | int) -> None:
    """Call a C function with the addresses of contiguous tensors and with 64-bit integers."""
    values = [
        ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_longlong(x)
        for x in arguments
    ]
    getattr(library, function)(*values)


def works() -> str:
    """Why native kernels cannot be used here; empty when a trial compiles and loads."""
    try:
        build("int seqzoo_trial(void) { return (int)sizeof(REAL); }", "float")
    except (RuntimeError, OSError) as error:
        return str(error)
    return ""


def _compile(cc: str, flags: list[str], source: str, folder: Path) -> Path:
    text, library = folder / "kernel.c", folder / "kernel.so"
    text.write_text(source)
    tries = [[*flags, "-fopenmp"], flags]  # clang on macOS has no OpenMP: one thread, same numbers
    for options in tries:
        command = [cc, *options, str(text), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return library
    words = " ".join(done.stderr.split())[:300]
    raise RuntimeError(f"{cc} could not compile a native kernel: {words}")


@cache
def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folder = Path(home) / "seqzoo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="seqzoo-"))


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
