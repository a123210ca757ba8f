"""A machine whose compiler is missing, broken or interrupted computes the same numbers anyway."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from seqzoo.kernels import native
from seqzoo.kernels.dispatch import choose, missing
from seqzoo.kernels.native import PRELUDE, REALS, build, works
from seqzoo.kernels.scan import scan
from seqzoo.kernels.scan.native import SOURCE

ROOT = Path(__file__).parents[2]
A, B = torch.rand(2, 7, 5), torch.randn(2, 7, 5)
FORTY_TWO = "int answer(void) { return 42; }"


def forget() -> None:
    for function in (works, build, native._compiler, native._own_folder):
        function.cache_clear()


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered of this process's compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "seqzoo"
    forget()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in the place of the machine's compilers."""

    def install(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "cc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/nowhere")

    return install


def assert_falls_back(words: str) -> None:
    want = scan(A, B, backend="chunked")[0]
    assert choose("scan", B) == "chunked"
    assert torch.equal(scan(A, B)[0], want)
    with pytest.raises(ValueError, match=words) as refused:
        scan(A, B, backend="native")
    assert "use chunked or reference" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert words in missing("compiler")


def test_native_is_the_default_where_a_compiler_works() -> None:
    assert missing("compiler") == ""
    assert choose("scan", B) == "native"


def test_without_a_compiler_the_default_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert_falls_back("no C compiler")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo out of licences >&2; exit 1", "out of licences"),
        ("exit 3", "exit code 3"),
        ('for last; do :; done; echo garbage > "$last"', "could not make a native kernel"),
        ("exit 0", "could not make a native kernel"),
    ],
    ids=["complains", "fails mutely", "writes garbage", "writes nothing"],
)
def test_a_broken_compiler_does_not_break_the_default(
    script: str, words: str, compiler: Callable[[str], None], fresh: Path
) -> None:
    compiler(script)
    assert_falls_back(words)
    assert list(fresh.glob("*.so")) == []


def test_a_broken_compiler_is_tried_once_and_not_at_every_call(
    compiler: Callable[[str], None], tmp_path: Path
) -> None:
    compiler(f"echo called >> {tmp_path}/log; exit 1")
    scan(A, B)
    tries = (tmp_path / "log").read_text()
    scan(A, B)
    assert (tmp_path / "log").read_text() == tries


def test_a_compiler_that_makes_wrong_code_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TRIAL", "int seqzoo_trial(int n) { return n; }")
    assert_falls_back("compiles wrong code")


def test_flags_that_a_compiler_does_not_know_are_left_out(
    compiler: Callable[[str], None],
) -> None:
    real = native._compiler()
    forget()
    compiler(
        'for word; do case "$word" in -march=native|-fopenmp) exit 1;; esac; done\n'
        f'PATH=/usr/bin:/bin exec {real} "$@"'
    )
    assert works() == ""
    assert torch.allclose(scan(A, B, backend="native")[0], scan(A, B, backend="chunked")[0])


def test_a_cache_folder_that_cannot_be_written_is_replaced(fresh: Path) -> None:
    fresh.parent.write_text("a file where the folder should be")
    assert build(FORTY_TWO, "float").answer() == 42
    assert fresh.parent.is_file()


def test_a_cached_library_is_loaded_without_compiling_or_writing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(FORTY_TWO, "float")
    build.cache_clear()
    monkeypatch.setattr(native, "_fresh", lambda *_: pytest.fail("made again"))
    assert build(FORTY_TWO, "float").answer() == 42


@pytest.mark.parametrize("damage", ["truncated", "empty", "a flipped bit", "a folder"])
def test_a_damaged_library_is_made_again(damage: str, fresh: Path) -> None:
    # Compiled by another process: this one would go on with the library it has open.
    run(f"from seqzoo.kernels.native import build; build({FORTY_TWO!r}, 'float')")
    (path,) = fresh.glob("*.so")
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a flipped bit":
        path.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    assert build(FORTY_TWO, "float").answer() == 42
    if damage != "a folder":
        assert path.read_bytes() == whole


def test_the_cache_knows_source_and_flags_apart(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, real in ((FORTY_TWO, "float"), (FORTY_TWO, "double"), (FORTY_TWO + "\n", "float")):
        build(text, real)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g0"))
    build.cache_clear()
    build(FORTY_TWO, "float")
    assert len({path.name.split("-")[0] for path in fresh.glob("*.so")}) == 4
    build.cache_clear()
    build(FORTY_TWO, "float")
    assert len({path.name.split("-")[0] for path in fresh.glob("*.so")}) == 4


def test_processes_that_compile_at_once_all_get_whole_libraries(fresh: Path) -> None:
    code = "from seqzoo.kernels.native import build; from seqzoo.kernels.scan.native import SOURCE"
    code += "; build(SOURCE, 'float').scan_forward; build(SOURCE, 'double').scan_backward"
    started = [start(code) for _ in range(3)]
    for process in started:
        _, words = process.communicate()
        assert process.returncode == 0, words
    assert len({path.name.split("-")[0] for path in fresh.iterdir()}) == 2


def test_threads_do_not_change_a_bit() -> None:
    a, b = torch.rand(3, 300, 301), torch.randn(3, 300, 301)

    def bits() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (a, b)]
        h, state = scan(*inputs, backend="native")
        return [h, state, *torch.autograd.grad(h.square().sum() + state.sum(), inputs)]

    one = bits()
    torch.set_num_threads(2)
    assert native.threads(a.numel()) == 2
    assert all(torch.equal(x, y) for x, y in zip(one, bits(), strict=True))


def test_a_single_step_wakes_no_second_thread() -> None:
    torch.set_num_threads(2)
    assert native.threads(4 * 256) == 1


def test_a_strided_tensor_never_reaches_c() -> None:
    with pytest.raises(AssertionError, match="no strides"):
        native.call(build(SOURCE, "float"), "scan_forward", torch.zeros(2, 3).t())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux is asked")
def test_large_tensors_ask_for_large_pages_within_their_own_memory(monkeypatch) -> None:
    asked = []

    class Libc:
        @staticmethod
        def madvise(first, size, advice) -> None:
            asked.append((first.value, size.value, advice))

    monkeypatch.setattr(native, "_libc", Libc)
    library = build(PRELUDE + PRODUCTS, "float")
    small, large = torch.zeros(64), torch.zeros(native.LARGE // 4 + 64)
    native.call(library, "power", small, large[:64], 64, 0)
    assert asked == []
    for shift in (0, 1):  # a page begins anywhere in a tensor
        native.call(library, "power", small, large[shift:], 64, 0)
        first, size, advice = asked.pop()
        assert first % mmap.PAGESIZE == 0
        begin, end = large[shift:].data_ptr(), large.data_ptr() + large.nbytes
        assert begin <= first < begin + mmap.PAGESIZE
        assert first + size == end
        assert advice == mmap.MADV_HUGEPAGE


PRODUCTS = """
void multiply(const REAL *A, const REAL *B, REAL *C, i64 m, i64 n, i64 p, i64 turned, i64 add)
{
    product(m, n, p, A, turned ? 1 : p, turned ? m : 1, B, n + 3, C, n + 2, add);
}
void turn(const REAL *from, REAL *to, i64 m, i64 n) { transpose(m, n, from, n + 3, to, m + 2); }
void power(const REAL *from, REAL *to, i64 n, i64 lift) { exponentials(from, to, n, lift); }
"""


@pytest.mark.parametrize(("dtype", "real"), REALS.items(), ids=str)
def test_small_products_are_those_of_torch_and_write_nothing_else(
    dtype: torch.dtype, real: str
) -> None:
    library = build(PRELUDE + PRODUCTS, real)
    for m, n, p in product((0, 1, 4, 7), (1, 8, 16, 33, 64, 90), (0, 1, 63, 130)):
        A, B, C = (torch.randn(size, dtype=dtype) for size in ((m, p), (p, n + 3), (m, n + 2)))
        for turned, add in product((0, 1), (-1, 0, 1)):
            stored, found = (A.t() if turned else A).contiguous(), C.clone()
            native.call(library, "multiply", stored, B, found, m, n, p, turned, add)
            wanted = C.clone()
            wanted[:, :n] = A @ B[:, :n] if add == 0 else C[:, :n] + add * (A @ B[:, :n])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(found[:, n:], C[:, n:])
        D = torch.randn(n, m + 2, dtype=dtype)
        wanted = torch.cat([C[:, :n].t(), D[:, m:]], dim=1)
        native.call(library, "turn", torch.cat([C, C[:, :1]], dim=1), D, m, n)
        assert torch.equal(D, wanted)


@pytest.mark.parametrize(("dtype", "real"), REALS.items(), ids=str)
def test_exponentials_are_right_in_the_last_place_down_to_nothing(
    dtype: torch.dtype, real: str
) -> None:
    library = build(PRELUDE + PRODUCTS, real)
    least = -103 if dtype == torch.float32 else -740
    x = torch.cat([torch.linspace(least, 0, 3996), torch.tensor([-1e-8, -1e4, -torch.inf, 88])])
    x = x.to(dtype)
    found, lifted = torch.empty_like(x), torch.empty_like(x)
    native.call(library, "power", x, found, len(x), 0)
    native.call(library, "power", x, lifted, len(x), 32)
    wanted, info = x.double().exp(), torch.finfo(dtype)
    unit = info.eps if dtype == torch.float32 else 40 * info.eps  # torch's own is no better
    assert ((found - wanted).abs() <= unit * wanted + info.smallest_normal * info.eps).all()
    wrong = (lifted.double() / 2.0**32 - wanted).abs()[x <= 0]  # no subnormal number is rounded
    assert (wrong <= unit * wanted[x <= 0]).all()
    assert found[-2] == 0
    assert found[-3] == 0
    power = torch.full((16,), torch.nan, dtype=dtype)
    native.call(library, "power", power, power, 16, 0)
    assert power.isnan().all()


def run(code: str) -> None:
    process = start(code)
    _, words = process.communicate()
    assert process.returncode == 0, words


def start(code: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
