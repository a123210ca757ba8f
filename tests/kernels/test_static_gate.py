"""No kernel ships that spills, cannot launch or has 32-bit addresses; and the gate does shut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.static_gate import (
    KERNELS,
    MOST_CONFIGS,
    SHARED,
    Usage,
    complaints,
    lint,
    read_amd,
    read_cuda,
    unlisted,
)

pytest.importorskip("triton")
FUSED = sorted(KERNELS.glob("*/fused.py"))
ROOT = KERNELS.parent

# Shaped as cuobjdump and LLVM print it.
SPILLING = "Function _backward: REG:255 STACK:5208 SHARED:1024 LOCAL:0 CONSTANT[0]:616 TEXTURE:0"
ASSEMBLY = """
    .group_segment_fixed_size: 4096
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 1
    .vgpr_count:     120
    .vgpr_spill_count: 2
    v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], 0
"""


def compiled(code: str) -> object:
    """Run code in a process whose kernels are compiled and not interpreted; its JSON answer."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", f"import json\nfrom tests.kernels.static_gate import *\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", FUSED, ids=lambda p: p.parent.name)
def test_no_variant_spills_or_outgrows_shared_memory_on_any_processor(path: Path) -> None:
    rows = compiled(f"print(json.dumps(report({path.parent.name!r})))")
    assert rows
    assert {r["variant"]: r["complaints"] for r in rows if r["complaints"]} == {}


@pytest.mark.parametrize("path", FUSED, ids=lambda p: p.parent.name)
def test_every_launched_kernel_is_listed_with_at_most_four_configurations(path: Path) -> None:
    code = f"from seqzoo.kernels.{path.parent.name}.fused import KERNELS as listed\n"
    code += "print(json.dumps([(v.kernel.__name__, v.config) for v in listed]))"
    configs: dict[str, set[str]] = {}
    for name, config in compiled(code):
        tuned = {k: v for k, v in config.items() if k.startswith("BLOCK") or k.islower()}
        configs.setdefault(name, set()).add(json.dumps(tuned, sort_keys=True))
    assert unlisted(path.read_text(), set(configs)) == []
    assert max(map(len, configs.values())) <= MOST_CONFIGS


@pytest.mark.parametrize("path", FUSED, ids=lambda p: p.parent.name)
def test_no_source_has_a_32_bit_address_or_a_dot_of_unnamed_precision(path: Path) -> None:
    assert lint(path.read_text()) == []


def test_a_kernel_that_spills_is_measured_as_spilling() -> None:
    code = """
from seqzoo.kernels.scan.fused import KERNELS as listed
config = listed[-1].config | {"BLOCK_T": 128, "BLOCK_D": 32, "num_warps": 1}
print(json.dumps(measure(listed[-1]._replace(config=config), "sm_80")))
"""
    usage = Usage(*compiled(code))
    assert usage.spilled > 100
    assert complaints(usage, "sm_80") == [f"spills {usage.spilled} bytes"]


def test_recorded_compiler_output_is_read_and_refused() -> None:
    usage = read_cuda(SPILLING, "HGMMA.64x64x16 HGMMA", 235_000, "sm_90")
    assert usage == Usage(255, 5208, 236_024, 2)
    assert len(complaints(usage, "sm_90")) == 2
    assert read_amd(ASSEMBLY, 1024) == Usage(120, 24, 4096, 1)


@pytest.mark.parametrize("target", SHARED)
def test_each_limit_is_refused_one_byte_beyond_and_not_before(target: str) -> None:
    assert complaints(Usage(255, 0, SHARED[target], 1), target, matrix=True) == []
    assert complaints(Usage(32, 4, 0), target) == ["spills 4 bytes"]
    assert complaints(Usage(32, 0, SHARED[target] + 1), target)
    assert complaints(Usage(32, 0, 0, 0), target, matrix=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tl.store(x + tl.program_id(0) * n, 0)", "not int64"),
        ("i = tl.program_id(0)\n    at = i * n + 1\n    tl.load(x + at)", "not int64"),
        ("for t in range(n):\n        tl.load(x + t * n)", "not int64"),
        ("x += n * n\n    tl.store(x, 0)", "not int64"),
        ("tl.load(x + tl.cast(n, tl.int64) + n * n)", "not int64"),
        ("tl.dot(x, x)", "input_precision"),
        ("tl.associative_scan(x, 0, add, reverse=True)", "reverse scan"),
    ],
)
def test_lint_refuses(line: str, words: str) -> None:
    found = lint(f"@triton.jit\ndef kernel(x, n):\n    {line}\n")
    assert len(found) == 1
    assert words in found[0]


def test_lint_lets_wide_addresses_pass() -> None:
    source = """
@triton.jit
def kernel(x, n, STEP: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    i = tl.arange(0, STEP)
    x += row * n
    at = (row * n + i)[:, None] * n
    tl.store(x + at + STEP * 4, tl.dot(x, x, input_precision="ieee") * 2)
"""
    assert lint(source) == []
    assert lint("@triton.autotune(configs=[])\n@triton.jit\ndef kernel(x):\n    pass\n") != []


def test_a_kernel_forgotten_in_the_list_is_named() -> None:
    source = "@triton.jit\ndef inner():\n    pass\n@triton.jit\ndef outer():\n    inner()\n"
    assert unlisted(source, set()) == ["outer"]
    assert unlisted(source, {"outer"}) == []
