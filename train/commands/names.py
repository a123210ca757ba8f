"""What the parser of `seqzoo fit` refuses, in one line: the place and the nearest name."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from difflib import get_close_matches

from lightning.pytorch import Trainer

from seqzoo.kernels.errors import unknown
from seqzoo.train.commands.errors import condense
from seqzoo.train.data import Tokens
from seqzoo.train.module import Training
from seqzoo.train.newest import Newest
from seqzoo.zoo.spec import DecoderSpec

OPTION = (
    r"unrecognized arguments: --([\w.]+)",
    r"Option '([\w.]+)' is not accepted",
    r"(Group '[\w.]*' does not accept option '[\w.]+')",
)
CLASSES: dict[str, type] = {"model": Training, "data": Tokens}
PLAIN = ("--run", "--config", "--ckpt_path", "--seed_everything", "--print_config", "--help")


def refuse(text: str) -> ValueError:
    """The parser's message `text`, made short."""
    places = re.findall(r'Parser key "([\w.]+)"', text)
    kind = places[0] if places else ""
    name = re.search(r"Expected a dot import path string: (\S+)", text)
    if name and kind in CLASSES:
        return unknown(kind, name[1], (cls.__name__ for cls in _below(CLASSES[kind])))
    for pattern in OPTION:
        found = re.search(pattern, text)
        if found:
            inner = ".".join(re.findall(r"'([\w.]+)'", found[1])) or found[1]
            return _no_option(f"--{'.'.join(filter(None, [kind, inner]))}")
    plain = re.sub(
        r"Expected a <class '(\w+)'>",
        r"expected \1",
        condense(re.sub(r'Parser key "[\w.]+":', "", text)),
    )
    return ValueError(f"{'.'.join(places)}: {plain}" if places else plain)


def _no_option(name: str) -> ValueError:
    near = get_close_matches(name, {*PLAIN, *_options()}, n=3, cutoff=0.6)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return ValueError(f"no option {name}{hint}; `--help` shows all")


def _options() -> Iterator[str]:
    for group, cls in (("trainer", Trainer), ("checkpoint", Newest), *_classes()):
        for name in inspect.signature(cls).parameters:
            yield f"--{group}.{name}"
    for field in dataclasses.fields(DecoderSpec):
        yield f"--model.decoder.{field.name}"


def _classes() -> Iterator[tuple[str, type]]:
    for group, base in CLASSES.items():
        for cls in (base, *_below(base)):
            yield group, cls


def _below(base: type) -> list[type]:
    """Classes that can be asked for by name."""
    direct: list[type] = base.__subclasses__()
    every = [*direct, *(cls for sub in direct for cls in _below(sub))]
    return [cls for cls in every if not _is_abstract(cls)]


def _is_abstract(cls: type) -> bool:
    """Lightning's classes have no metaclass that would keep count."""
    members = (getattr(cls, name, None) for name in dir(cls))
    return any(getattr(member, "__isabstractmethod__", False) for member in members)
