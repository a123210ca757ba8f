"""What can be said of a Triton kernel without a GPU, and must hold.

`python -m tests.kernels.static_gate scan` compiles every variant of `kernels/scan/fused.py` ahead
of time for three processors and prints a report as JSON. TRITON_INTERPRET must not be set. The
rules over the source (`lint`) need no compiler.
"""

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
MATRIX = {"sm_80": r"\bHMMA", "sm_90": r"\b(HGMMA|HMMA)", "gfx942": r"\bv_mfma"}
MOST_CONFIGS = 4
KERNELS = Path(__file__).parents[2] / "kernels"


class Usage(NamedTuple):
    """What one compiled variant takes: registers a thread, bytes spilled and shared."""

    registers: int
    spilled: int
    shared: int
    matrix: int = 0


def complaints(usage: Usage, target: str, matrix: bool = False) -> list[str]:
    """Why a compiled variant may not ship; empty when it may."""
    found = []
    if usage.spilled:
        found.append(f"spills {usage.spilled} bytes")
    if usage.shared > SHARED[target]:
        found.append(f"wants {usage.shared} bytes of shared memory; {SHARED[target]} fit")
    if matrix and not usage.matrix:
        found.append("its dots are no matrix instructions")
    return found


def read_cuda(resources: str, sass: str, shared: int, target: str) -> Usage:
    """From what cuobjdump says of a cubin, and Triton's own count of dynamic shared memory."""
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    matrix = len(re.findall(MATRIX[target], sass))
    return Usage(numbers["REG"], spilled, numbers["SHARED"] + shared, matrix)


def read_amd(assembly: str, shared: int) -> Usage:
    """From the assembly text, and Triton's own count of dynamic shared memory."""

    def number(name: str) -> int:
        return max(int(n) for n in re.findall(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE))

    lost = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    spilled = lost + number("private_segment_fixed_size")
    shared = max(shared, number("group_segment_fixed_size"))
    return Usage(number("vgpr_count"), spilled, shared, len(re.findall(MATRIX["gfx942"], assembly)))


def measure(variant: Any, target: str) -> Usage:
    """Compile a variant ahead of time, specialised as at run time, and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from seqzoo.kernels.fused import OPTIONS

    names = variant.kernel.arg_names
    aligned = [n for n, t in variant.types.items() if t.startswith("*") or variant.aligned]
    source = ASTSource(
        variant.kernel,
        {n: variant.types.get(n, "constexpr") for n in names},
        {(i,): variant.config[n] for i, n in enumerate(names) if n not in variant.types},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = OPTIONS | {k: v for k, v in variant.config.items() if k not in names}
    if target.startswith("gfx"):
        made = triton.compile(source, GPUTarget("hip", target, 64), options)
        return read_amd(made.asm["amdgcn"], made.metadata.shared)
    made = triton.compile(source, GPUTarget("cuda", int(target[3:]), 32), options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        resources, sass = (
            subprocess.run([tool, flag, cubin.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    return read_cuda(resources.stdout, sass.stdout, made.metadata.shared, target)


def report(folder: str) -> list[dict[str, Any]]:
    """A row for every variant of a kernel folder on every target."""
    module = import_module(f"seqzoo.kernels.{folder}.fused")
    rows = []
    for variant in module.KERNELS:
        for target in SHARED:
            usage = measure(variant, target)
            name = f"{variant.kernel.__name__} {variant.config} {target}"
            wrong = complaints(usage, target, variant.matrix)
            rows.append({"variant": name, "usage": usage._asdict(), "complaints": wrong})
    return rows


def lint(source: str) -> list[str]:
    """Rules over the source of a `fused.py`, each with the line that breaks it.

    Every tl.dot names its input_precision; every product in an address is int64 (or of constants);
    no scan with reverse=True, which Triton has had wrong; no autotuning; every kernel that is
    launched is among KERNELS.
    """
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        name = _called(node)
        given = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else set()
        if name == "dot" and "input_precision" not in given:
            found.append(f"line {node.lineno}: tl.dot without input_precision")
        if name == "associative_scan" and "reverse" in given:
            found.append(f"line {node.lineno}: a reverse scan; flip the indices")
        if name == "autotune":
            found.append(f"line {node.lineno}: autotuning; list the configurations in KERNELS")
    for function in _jitted(tree):
        found += _narrow_products(function)
    return found


def unlisted(source: str, listed: set[str]) -> list[str]:
    """Names of jitted functions neither listed in KERNELS nor used by another jitted function."""
    functions = _jitted(ast.parse(source))
    used = {
        node.id
        for function in functions
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name)
    }
    return [f.name for f in functions if f.name not in listed | used]


def _jitted(tree: ast.AST) -> list[ast.FunctionDef]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return [f for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)]


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def _narrow_products(function: ast.FunctionDef) -> Iterator[str]:
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            moved = ast.BinOp(node.target, node.op, node.value)
            values.setdefault(node.target.id, []).append(ast.copy_location(moved, node))
    addresses = [
        node.args[0]
        for node in ast.walk(function)
        if _called(node) in ("load", "store") or _called(node).startswith("atomic_")
    ]
    seen: set[str] = set()
    while addresses:
        for node in ast.walk(addresses.pop()):
            if isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                addresses += values.get(node.id, [])
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                sides = (node.left, node.right)
                if not any(_wide(s, values, set()) for s in sides) and not all(map(_fixed, sides)):
                    line = f"line {node.lineno}: {ast.unparse(node)}"
                    yield f"{line} is part of an address and not int64"


def _wide(node: ast.expr, values: dict[str, list[ast.expr]], open_names: set[str]) -> bool:
    """Whether an expression is int64: it holds a cast to it, itself or through its names."""
    if _called(node) in ("cast", "to") and "int64" in ast.unparse(node):
        return True
    if isinstance(node, ast.Name):
        if node.id in open_names:  # i = i + ...: as wide as its other values
            return True
        given = values.get(node.id, [])
        return bool(given) and all(_wide(v, values, open_names | {node.id}) for v in given)
    inner = (n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr))
    return any(_wide(n, values, open_names) for n in inner)


def _fixed(node: ast.expr) -> bool:
    """Whether an expression is made of literals and tl.constexpr names, which are capitals."""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return all(n.isupper() and len(n) > 1 for n in names)


if __name__ == "__main__":
    json.dump({folder: report(folder) for folder in sys.argv[1:]}, sys.stdout)
