"""What a decoder is made of: a flat residual stack described by a list of names.

    d_model: 256
    pattern: [mamba2, swiglu, local, experts]      # one entry = norm + mixer + residual
    repeats: 4
    options: {mamba2: {d_state: 64}, local: {is: attention, window: 256}, experts: {is: switch}}
    swap: {10: gla}

A wrong name or number is refused when the description is made: each mixer it names is built once
without memory (on the meta device), so what a mixer refuses is refused here.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.layers import create_mixer, mixer_class, mixer_info
from seqzoo.layers.base import Bidirectional, Mixer
from seqzoo.layers.position import Position, create_position, position_class
from seqzoo.zoo.seeds import seeded

NORMS = ("rmsnorm", "layernorm")
CHANNEL_MIXER = "swiglu"  # the second half of the short form


class EntrySpec(NamedTuple):
    """One entry of the stack: its name in the pattern, the mixer behind it, the mixer's options."""

    name: str
    mixer: str
    options: dict[str, Any]


@dataclass(frozen=True)
class DecoderSpec:
    """A residual stack as plain data, the same in YAML, in Python and in a config.json.

    Attributes:
        d_model: width D.
        pattern: names of the entries, a list or a string such as `"mamba2*3, attention"`.
        mixer: short form of a uniform stack: `mixer: x` is `pattern: [x, swiglu]`. With neither,
            the stack is `[attention, swiglu]`.
        repeats: how often the pattern is stacked.
        options: options of each name; `is` says which mixer a name of your own stands for.
        position: default of every mixer that has a `position` option. Schemes that embed positions
            (sinusoidal, learned) are added to the token embedding instead.
        swap: entries to replace, by index from 0.
        norm: `rmsnorm` or `layernorm`, before each mixer and at the end.
        norm_eps: what those norms add to the variance.
        tie_embeddings: the head shares the token embedding's weight.
        causal: False makes a bidirectional encoder: mixers that can read both ways do, strict ones
            are run once in each direction.
        dropout: of the embedding and of what each mixer adds to the stream.
        max_length: longest sequence, the default of every mixer that has such an option.

    Raises:
        ValueError: an unknown name or option, a swap outside of the stack, a mixer that refuses
            its options or that this decoder cannot use.
    """

    d_model: int = 256
    pattern: list[str] | str | None = None
    mixer: str | None = None
    repeats: int = 1
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    position: str | dict[str, Any] | None = None
    swap: dict[int, str] = field(default_factory=dict)
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    causal: bool = True
    dropout: float = 0.0
    max_length: int | None = None

    def __post_init__(self) -> None:
        swap = {int(index): name for index, name in self.swap.items()}  # JSON's keys are strings
        object.__setattr__(self, "swap", swap)
        check_positive(d_model=self.d_model, repeats=self.repeats, norm_eps=self.norm_eps)
        if self.max_length is not None:
            check_positive(max_length=self.max_length)
        if isinstance(self.position, dict) and "name" not in self.position:
            raise ValueError(f"position {self.position} has no name; write {{name: rope, ...}}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not allowed; it must be in [0, 1)")
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        for name in self.options:
            self._mixer_of(name)
        with torch.device("meta"), seeded(0):
            self.build_position()
            tried: list[EntrySpec] = []
            for entry in self.resolve():
                if entry not in tried:
                    self.build(entry)
                    tried.append(entry)

    def resolve(self) -> list[EntrySpec]:
        """The flat stack, with the decoder's defaults filled into each mixer's options."""
        return [self._entry(name) for name in self.names()]

    def names(self) -> list[str]:
        """The name of each entry."""
        names = stack_of(self.pattern, self.mixer) * self.repeats
        for index, name in self.swap.items():
            if not 0 <= index < len(names):
                raise ValueError(
                    f"swap of entry {index} is not allowed; the stack has entries 0 to"
                    f" {len(names) - 1}"
                )
            names[index] = name
        return names

    def build(self, entry: EntrySpec) -> Mixer:
        """The mixer of an entry, ready for this decoder.

        Raises:
            ValueError: the mixer refuses its options, or a decoder of this kind cannot use it.
        """
        make = partial(create_mixer, entry.mixer, self.d_model, **entry.options)
        label = repr(entry.name) if entry.name == entry.mixer else f"{entry.name!r} ({entry.mixer})"
        try:
            mixer = make()
        except (TypeError, ValueError) as error:
            raise ValueError(f"entry {label}: {error}") from error
        if self.causal:
            refusal = _refusal(mixer)
            if refusal:
                raise ValueError(f"entry {label}: {refusal}")
            return mixer
        both_ways = "causal" in entry.options or mixer.caps.causality == "none"
        return mixer if both_ways or mixer.kind == "channel" else Bidirectional(make)

    def build_position(self) -> Position | None:
        """The scheme added to the token embedding; None when there is none of that kind."""
        if self.position is None or not self._embeds():
            return None
        return create_position(
            self.position,
            n_heads=1,
            head_dim=self.d_model,
            d_model=self.d_model,
            max_length=self.max_length,
            causal=self.causal,
        )

    def swapped(self, swap: Mapping[int, str]) -> "DecoderSpec":
        """The same stack with other entries: `spec.swapped({10: "gated_deltanet"})`."""
        return dataclasses.replace(self, swap={**self.swap, **swap})

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON gives back unchanged."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> "DecoderSpec":
        """The inverse of `to_dict`; what is missing takes its default."""
        return cls(**plain(description))

    def _embeds(self) -> bool:
        name = self.position["name"] if isinstance(self.position, dict) else self.position
        return name is not None and "embed" in position_class(name).hooks

    def _mixer_of(self, name: str) -> str:
        mixer = self.options.get(name, {}).get("is", name)
        mixer_class(mixer)
        return str(mixer)

    def _entry(self, name: str) -> EntrySpec:
        mixer = self._mixer_of(name)
        options = {key: value for key, value in self.options.get(name, {}).items() if key != "is"}
        takes = mixer_info(mixer).options
        defaults: dict[str, Any] = {"max_length": self.max_length}
        if not self._embeds():
            defaults["position"] = self.position
        given = {k: v for k, v in defaults.items() if k in takes and v is not None}
        if not self.causal and "causal" in takes:
            given["causal"] = False
        return EntrySpec(name, mixer, {**given, **options})


def stack_of(pattern: list[str] | str | None, mixer: str | None = None) -> list[str]:
    """The names of a pattern, with `name*3` written out.

    Raises:
        ValueError: both forms given, an empty pattern, or a count that is no number above zero.
    """
    if pattern is not None and mixer is not None:
        raise ValueError("pattern and mixer are two ways to say the same; give one of them")
    if pattern is None:
        return [mixer or "attention", CHANNEL_MIXER]
    names: list[str] = []
    for item in pattern.split(",") if isinstance(pattern, str) else pattern:
        match = re.fullmatch(r"([^*\s]+)(?:\s*\*\s*([1-9]\d*))?", item.strip())
        if match is None:
            raise ValueError(f"pattern item {item!r} is not allowed; write `name` or `name*3`")
        names += [match[1]] * int(match[2] or 1)
    if not names:
        raise ValueError("pattern [] is not allowed; it needs at least one name")
    return names


def plain(description: Mapping[str, Any]) -> dict[str, Any]:
    """A complete description in what JSON knows, with every default filled in.

    Raises:
        ValueError: a field that a decoder does not have, or a value that JSON cannot hold.
    """
    fields = {f.name: f for f in dataclasses.fields(DecoderSpec)}
    for name in description:
        if name not in fields:
            raise unknown("decoder option named", name, fields)
    defaults = {
        name: {} if f.default is dataclasses.MISSING else f.default for name, f in fields.items()
    }
    try:
        text = json.dumps({**defaults, **description}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the decoder's description is no plain data: {error}") from error
    complete: dict[str, Any] = json.loads(text)
    return complete


def _refusal(mixer: Mixer) -> str:
    """Why a causal decoder cannot use a mixer; empty when it can."""
    if mixer.caps.causality == "none":
        return (
            "it is bidirectional, so a causal decoder cannot use it; use it with `causal: false`"
            " (listops, text, retrieval, image, pathfinder: the classification tasks), or take one"
            " of list_mixers(causal=True)"
        )
    if not mixer.caps.prefix:
        return (
            "its output depends on the length of the whole sequence, so stepping would differ from"
            " training; set max_length"
        )
    return ""
