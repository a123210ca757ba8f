"""Reading modules to be bundled: what each needs, at import and later."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIBRARY = "seqzoo"
ALWAYS_THERE = {"torch", "transformers", *sys.stdlib_module_names}


class Module(NamedTuple):
    """A module to be bundled."""

    name: str
    path: Path
    text: str
    tree: ast.Module


def read(name: str) -> Module:
    """Find and parse a module.

    Raises:
        ValueError: no source file, or a module of somebody else's that is not on its own.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"module {name} has no source file, so it cannot be exported")
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    module = Module(name, path, text, ast.parse(text))
    if not _ours(name):
        _check_foreign(module)
    return module


def imported(module: Module) -> Iterator[str]:
    """Modules of the library that a module imports.

    Raises:
        ValueError: an import in a form that cannot be rewritten.
    """
    for node in imports(module.tree):
        if isinstance(node, ast.Import):
            if any(_ours(alias.name) for alias in node.names):
                raise ValueError(
                    f"{module.name} says `import seqzoo`; write `from seqzoo.x import Name`"
                )
        elif _ours(node.module or ""):
            if node.module == LIBRARY:
                raise ValueError(
                    f"{module.name} says `from seqzoo import`; name the module, as in"
                    " `from seqzoo.layers.base import Mixer`"
                )
            yield str(node.module)


def catalogued(module: Module, used: set[str]) -> Iterator[str]:
    """Modules that a catalogue of this module loads for the model."""
    for mapping in catalogues(module.tree):
        for path in values(mapping):
            if path in used:
                yield path.partition(":")[0]


def plugins(description: object) -> Iterator[str]:
    """Modules of the `module:Class` paths in a decoder's description."""
    if isinstance(description, dict):
        for key, value in description.items():
            yield from plugins(key)
            yield from plugins(value)
    elif isinstance(description, list):
        for value in description:
            yield from plugins(value)
    elif isinstance(description, str):
        yield from re.findall(r"([\w.]+):[A-Za-z_]\w*", description)


def backends(module: Module) -> list[str]:
    """The siblings that `import_module(f"{__name__}.{backend}")` may load."""
    asks = any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "import_module"
        and "__name__" in ast.unparse(node)
        for node in ast.walk(module.tree)
    )
    if not asks:
        return []
    siblings = sorted(module.path.parent.glob("*.py"))
    return [f"{module.name}.{p.stem}" for p in siblings if p.stem != "__init__"]


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def catalogues(tree: ast.Module) -> Iterator[ast.Dict]:
    """Top-level dicts from names to `module:Class` paths of the library."""
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
            paths = list(values(value))
            if paths and all(re.fullmatch(r"seqzoo\.[\w.]+:\w+", path) for path in paths):
                yield value


def values(mapping: ast.Dict) -> Iterator[str]:
    """Its values that are text, and "" for the others."""
    for value in mapping.values:
        text = value.value if isinstance(value, ast.Constant) else None
        yield text if isinstance(text, str) else ""


def _check_foreign(module: Module) -> None:
    """A user's own module goes along when it is one file on top of the library."""
    for node in imports(module.tree):
        wanted = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{module.name} has a relative import; it must be a single file")
        for other in wanted:
            top = str(other).partition(".")[0]
            if top not in ALWAYS_THERE | {LIBRARY}:
                raise ValueError(
                    f"{module.name} imports {other}; to be exported it must be a single file that"
                    " imports only seqzoo, torch and the standard library"
                )


def _ours(name: str) -> bool:
    return name.partition(".")[0] == LIBRARY
