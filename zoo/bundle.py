"""Source code that travels with the weights: the modules a model needs, as flat files.

transformers copies single files that import each other as `from .name import X`, and no folders.
So `seqzoo.kernels.scan.chunked` becomes `seqzoo_kernels_scan_chunked.py`, word for word, except:

- imports within the bundle become relative, and other optional packages are imported in a `try`,
  which transformers' check for missing packages skips;
- `import_module` looks in the bundle first, and what it may load is named where transformers sees
  it;
- catalogues keep only what the model uses;
- text that a module reads from the file beside it is written into the module;
- custom operators get a namespace of this bundle, so several bundles, and the library itself, live
  in one process.
"""

import ast
import hashlib
import re

from seqzoo.zoo.model import ZooPreTrainedModel
from seqzoo.zoo.rewrite import LOADER, NAMESPACE, flat, rewrite
from seqzoo.zoo.sources import (
    LIBRARY,
    Module,
    backends,
    catalogued,
    imported,
    imports,
    plugins,
    read,
)

ROOTS = ("seqzoo.zoo.config", "seqzoo.zoo.model")
LOADER_SOURCE = '''"""Finds the modules of this folder by the names they have in the library."""

import importlib
from types import ModuleType

FILES = {files!r}


def import_module(name: str) -> ModuleType:
    """Import `seqzoo.layers.mamba` from `seqzoo_layers_mamba.py`, and anything else as usual."""
    flat = name.removeprefix(f"{{__package__}}.").replace(".", "_")
    if flat in FILES:
        return importlib.import_module(f".{{flat}}", __package__)
    return importlib.import_module(name)


def _files() -> None:
    """Never called: transformers copies the files that it sees imported."""
{imports}
'''


def bundle(model: ZooPreTrainedModel) -> dict[str, str]:
    """File names and sources of all that `model` needs to be loaded without the library.

    Raises:
        ValueError: a module that cannot travel; the message says which and why.
    """
    used = {f"{type(m).__module__}:{type(m).__qualname__}" for m in model.modules()}
    modules: dict[str, Module] = {}
    lazy = set(plugins(model.config.decoder))
    waiting = [*ROOTS, *lazy]
    while waiting:
        name = waiting.pop()
        if name not in modules:
            module = modules[name] = read(name)
            on_use = {*catalogued(module, used), *backends(module)}
            lazy |= on_use
            waiting += [*imported(module), *on_use]
    return _write(modules, lazy, used)


def _write(modules: dict[str, Module], lazy: set[str], used: set[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name, module in sorted(modules.items()):
        file = f"{flat(name)}.py"
        if file in files:
            raise ValueError(f"{name} and another module would both be {file}; rename one")
        files[file] = rewrite(module, set(modules), used)
    lines = [f"    from .{flat(name)} import {_a_name(modules[name])}" for name in sorted(lazy)]
    names = sorted(flat(name) for name in modules)
    files[f"{LOADER}.py"] = LOADER_SOURCE.format(files=names, imports="\n".join(lines))
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()
    namespace = f"{LIBRARY}_{digest[:12]}"
    return {file: _check(file, text.replace(NAMESPACE, namespace)) for file, text in files.items()}


def _a_name(module: Module) -> str:
    """Something that the module defines, for an import line to name."""
    defined = [n.name for n in module.tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return defined[0]


def _check(file: str, text: str) -> str:
    """What transformers' text search takes for relative imports must be what Python takes."""
    tree = ast.parse(text)
    seen = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
    seen |= set(re.findall(r"^\s*import\s+\.(\S+)\s*$", text, flags=re.MULTILINE))
    real = {n.module for n in imports(tree) if isinstance(n, ast.ImportFrom) and n.level}
    if seen != real:
        raise ValueError(
            f"{file} has text that looks like a relative import: {sorted(seen - real)}"
        )
    return text
