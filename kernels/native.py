"""C kernels, compiled by the machine's own compiler on first use and called through ctypes.

A library is cached under the user's cache folder. The first half of its name is a hash of what
makes it: source, compiler, flags and processor (`-march=native` code must not meet another one in
a shared home); the second is a hash of its bytes, so a damaged file is noticed before it is loaded.
It is written elsewhere, loaded and renamed: processes that compile at once do not see each other's
halves. A cache that cannot be written or loaded from is replaced by a folder of this process.
"""

import atexit
import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# -ffast-math would delete the rounding tricks that kernels rely on; contraction keeps the FMAs.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# For sources that are written in vectors: the same speed, and half the time to compile.
BRIEF = ("-O1", "-fpeel-loops", "-fstrict-aliasing", "-fexpensive-optimizations")
# Half of a source, so that whoever calls first waits for no more than what runs.
FORWARD, BACKWARD = (*BRIEF, "-DFORWARD"), (*BRIEF, "-DBACKWARD")
REALS = {torch.float32: "float", torch.float64: "double"}
LARGE = 1 << 22  # bytes of a tensor for which pages of 4 KiB are too small
# Vectors and products of small matrices, in C: kernels that use them put it before their source.
PRELUDE = Path(__file__).with_name("prelude.c").read_text()

# What kernels use of C beyond the standard, and a number that only a working compiler gets right.
TRIAL = """
typedef REAL lanes __attribute__((vector_size(4 * sizeof(REAL))));
int seqzoo_trial(int n) { lanes x = {n, n, n, n}; x = x * x + x; return (int)x[3]; }
"""


@cache
def works() -> str:
    """Why native kernels cannot be used here; empty when a trial compiles, loads and runs."""
    try:
        answer = build(TRIAL, "float").seqzoo_trial(6)
    except (RuntimeError, AttributeError) as error:
        return str(error)
    return "" if answer == 42 else f"{_compiler()} compiles wrong code: 6 * 6 + 6 = {answer}"


@cache
def build(source: str, real: str, options: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile C text, with REAL defined as `real`, or load it from the cache.

    `options` come after FLAGS and outdo them.

    Raises:
        RuntimeError: the compiler is missing or refused the source, whose first complaint is in
            the message; or what it made cannot be loaded.
    """
    cc = _compiler()
    if not cc:
        raise RuntimeError("no C compiler (cc, gcc or clang) on the PATH")
    flags = [*FLAGS, *options, f"-DREAL={real}"]
    made_of = "\0".join([source, cc, *flags, _processor()])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:20]
    library = _cached(key)
    return _fresh(key, cc, flags, source) if library is None else library


def call(library: ctypes.CDLL, function: str, *arguments: Tensor | int) -> None:
    """Call a C function with the addresses of contiguous tensors and with 64-bit integers."""
    values: list[ctypes.c_void_p | ctypes.c_longlong] = []
    for x in arguments:
        if isinstance(x, Tensor):
            assert x.device.type == "cpu", "native kernels read plain memory"
            assert x.is_contiguous(), "native kernels know no strides"
            if x.nbytes >= LARGE:
                _on_large_pages(x)
            values.append(ctypes.c_void_p(x.data_ptr()))
        else:
            values.append(ctypes.c_longlong(x))
    getattr(library, function)(*values)


def _on_large_pages(x: Tensor) -> None:
    """Ask Linux to back fresh memory by pages of 2 MiB; elsewhere, and if it will not, do nothing.

    The C library hands large blocks back as soon as they are freed, so every call meets fresh
    memory, and a fault for each 4 KiB of it is a fifth of the time of a fast kernel.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = x.data_ptr() + x.nbytes - first
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def threads(elements: int) -> int:
    """How many threads share so many elements: torch's, fewer where waking one costs more."""
    return min(torch.get_num_threads(), 1 + elements // 32768)


def _cached(key: str) -> ctypes.CDLL | None:
    for path in sorted(_cache_folder().glob(f"{key}-*.so")):
        try:
            if path.stem.endswith(_digest(path)):
                return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


def _fresh(key: str, cc: str, flags: list[str], source: str) -> ctypes.CDLL:
    reason = ""
    for folder in (_cache_folder(), _own_folder()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                path = _compile(cc, flags, source, Path(scratch))
                digest, library = _digest(path), ctypes.CDLL(str(path))
                path.replace(folder / f"{key}-{digest}.so")
                return library
        except (
            OSError
        ) as error:  # not writable, full, mounted noexec, or what cc made is no library
            reason = str(error)
    raise RuntimeError(f"{cc} could not make a native kernel: {reason}")


def _compile(cc: str, flags: list[str], source: str, folder: Path) -> Path:
    text, library = folder / "kernel.c", folder / "kernel.so"
    text.write_text(source)
    # clang on macOS has no OpenMP, some compilers do not know the processor: the same numbers.
    portable = [flag for flag in flags if flag != "-march=native"]
    first = ""
    for options in ([*flags, "-fopenmp"], flags, portable):
        command = [cc, *options, str(text), "-o", str(library)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode == 0:
            return library
        first = first or " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
    raise RuntimeError(f"{cc} could not compile a native kernel: {first}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


@cache
def _compiler() -> str:
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return next((path for path in found if path), "")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "seqzoo"


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="seqzoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
