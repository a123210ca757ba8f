"""Changing a few places of a source text and leaving every other character alone."""

import ast
import re
from typing import NamedTuple

from seqzoo.zoo.sources import ALWAYS_THERE, LIBRARY, Module, catalogues, values

LOADER = "seqzoo_bundle"
NAMESPACE = "seqzoo_namespace_of_this_bundle"  # until the digest of all files is known


class Edit(NamedTuple):
    """A replacement, from and to 0-based lines and UTF-8 byte columns, as `ast` counts them."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


def rewrite(module: Module, inside: set[str], used: set[str]) -> str:
    """A module as it reads in the bundle.

    Args:
        module: as it reads in the library.
        inside: names of all modules in the bundle.
        used: `module:Class` of everything in the model, which catalogues keep.

    Raises:
        ValueError: an import that cannot be rewritten.
    """
    edits: list[Edit] = []
    guarded = {
        child
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Try)
        for child in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            new = _import_line(node, inside)
            if new is None and node not in guarded:
                new = _guard(node)
            edits += [_replace(node, new)] if new else []
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{LIBRARY}::"):
            edits.append(_replace(node, repr(str(node.value).replace(LIBRARY, NAMESPACE, 1))))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{LIBRARY}":
            edits.append(_replace(node, f"torch.ops.{NAMESPACE}"))
        elif isinstance(node, ast.Call) and (name := _text_beside(node)):
            content = (module.path.parent / name).read_text(encoding="utf-8")
            escaped = content.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
            edits.append(_replace(node, f'"""{escaped}"""'))
    for mapping in catalogues(module.tree):
        pairs = zip(mapping.keys, values(mapping), strict=True)
        kept = {k.value: v for k, v in pairs if isinstance(k, ast.Constant) and v in used}
        edits.append(_replace(mapping, repr(kept)))
    return _apply(module.text, edits)


def _import_line(node: ast.Import | ast.ImportFrom, inside: set[str]) -> str | None:
    """The import as it reads in the bundle; None when it stays."""
    if isinstance(node, ast.Import):
        return None
    names = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in node.names)
    if node.module == "importlib" and names == "import_module":
        return f"from .{LOADER} import import_module"
    if node.module not in inside:
        return None
    for alias in node.names:
        if f"{node.module}.{alias.name}" in inside:
            raise ValueError(
                f"`from {node.module} import {alias.name}` imports a module; import names from it"
            )
    return f"from .{flat(node.module)} import {names}"


def _guard(node: ast.Import | ast.ImportFrom) -> str | None:
    """An import of a package that may be missing, within a `try`."""
    if isinstance(node, ast.Import):
        tops = {alias.name.partition(".")[0] for alias in node.names}
    else:
        tops = {(node.module or "").partition(".")[0]}
    if tops <= ALWAYS_THERE:
        return None
    pad = " " * node.col_offset
    return f"try:\n{pad}    {ast.unparse(node)}\n{pad}except ImportError:\n{pad}    raise"


def _text_beside(node: ast.Call) -> str | None:
    """The file named in `Path(__file__).with_name("...").read_text()`."""
    match = re.fullmatch(
        r"Path\(__file__\)\.with_name\('([\w.]+)'\)\.read_text\(.*\)", ast.unparse(node)
    )
    return match[1] if match else None


def flat(name: str) -> str:
    """The file name, without its ending, of a module in the bundle."""
    return name.replace(".", "_")


def _replace(node: ast.stmt | ast.expr, text: str) -> Edit:
    """Put `text` where a node stands."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return Edit(
        (node.lineno - 1, node.col_offset), (node.end_lineno - 1, node.end_col_offset), text
    )


def _apply(source: str, edits: list[Edit]) -> str:
    """The source with all edits made; they must not overlap."""
    lines = source.encode().split(b"\n")
    for edit in sorted(edits, reverse=True):
        (first, left), (last, right) = edit.start, edit.end
        joined = lines[first][:left] + edit.text.encode() + lines[last][right:]
        lines[first : last + 1] = joined.split(b"\n")
    return b"\n".join(lines).decode()
