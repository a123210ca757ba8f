"""A folder that loads with transformers alone, and the check that it is still what it was.

from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedTokenizerBase

from seqzoo.zoo.bundle import bundle
from seqzoo.zoo.card import card
from seqzoo.zoo.model import (
    ZooForCausalLM,
    ZooForSequenceClassification,
    ZooModel,
    ZooPreTrainedModel,
)
from seqzoo.zoo.rewrite import flat

SUMS = "SHA256SUMS"
AUTO = {
    ZooForCausalLM: "AutoModelForCausalLM",
    ZooForSequenceClassification: "AutoModelForSequenceClassification",
    ZooModel: "AutoModel",
}
WEIGHED = {".py", ".safetensors", ".bin", ".pt", ".json", ".jinja"}  # nothing of these unlisted


def export(
    model: ZooPreTrainedModel,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights, configuration, code, tokenizer, model card and SHA256SUMS to a folder.

    Everything is written to a folder beside the target, which then takes its name: a failure
    leaves the target as it was.

    Args:
        model: a `ZooForCausalLM`, `ZooForSequenceClassification` or `ZooModel`.
        path: the folder; its name may hold letters, digits, `.`, `_` and `-`.
        tokenizer: saved along.
        facts: lines for a table in the model card.
        overwrite: replace an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: the target exists, its name is not allowed, or the model's code cannot travel.
        TypeError: no model of this library.
    """
    if type(model) not in AUTO:
        names = ", ".join(cls.__name__ for cls in AUTO)
        raise TypeError(f"{type(model).__name__} cannot be exported; it must be one of {names}")
    target = Path(path).absolute()
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        model.save_pretrained(fresh)
        for name, source in bundle(model).items():
            (fresh / name).write_text(source, encoding="utf-8")
        _point_to_code(fresh / "config.json", model)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        readme = card(model, target.name, facts or {})
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        lines = [f"{_digest(file)}  {file.relative_to(fresh)}" for file in _files(fresh)]
        (fresh / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        _put_in_place(fresh, target, Path(scratch) / "earlier")
    return target


def verify(path: str | Path) -> list[str]:
    """Check an exported folder against its SHA256SUMS.

    Returns:
        The names that were checked.

    Raises:
        ValueError: a file that is missing, changed, outside of the folder, or that loading would
            use although it is not listed.
    """
    folder = Path(path).resolve()
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} has no {SUMS}, so it is no export that can be verified")
    listed: list[str] = []
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        file = folder / name
        if not (name and inside and file.resolve().is_relative_to(folder)):
            raise ValueError(f"{SUMS} names {name!r}, which is outside of the folder")
        if not file.is_file():
            raise ValueError(f"{name} is missing from {folder}")
        if _digest(file) != wanted:
            raise ValueError(f"{name} is not the file that was exported: its SHA-256 differs")
        listed.append(name)
    for file in _files(folder):
        name = str(file.relative_to(folder))
        if file.suffix in WEIGHED and name not in listed:
            raise ValueError(f"{name} is not listed in {SUMS}")
    return listed


def _check_target(target: Path, overwrite: bool) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", target.name):
        raise ValueError(f"{target.name!r} is not allowed; use letters, digits, '.', '_' and '-'")
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists; pass overwrite=True (--overwrite) to replace it")
    if not target.is_dir() or target.is_symlink():
        raise ValueError(f"{target} is no folder, so it is not overwritten")
    if any(target.iterdir()) and not (target / SUMS).is_file():
        raise ValueError(f"{target} is no earlier export, so it is not overwritten")


def _put_in_place(fresh: Path, target: Path, earlier: Path) -> None:
    """Give `fresh` the name `target`; what had it goes to `earlier`, or stays when that fails."""
    if target.exists():
        target.rename(earlier)
    try:
        fresh.rename(target)
    except OSError:
        if earlier.exists():
            earlier.rename(target)
        raise


def _point_to_code(config_file: Path, model: ZooPreTrainedModel) -> None:
    """Tell transformers in which file each class is."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": f"{flat('seqzoo.zoo.config')}.ZooConfig"} | {
        auto: f"{flat('seqzoo.zoo.model')}.{cls.__name__}" for cls, auto in AUTO.items()
    }
    if not model.config.spec.causal:
        del config["auto_map"]["AutoModelForCausalLM"]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
