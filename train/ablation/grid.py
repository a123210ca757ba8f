"""A grid: which stacks are compared, on which tasks, at which rates and seeds.

    name: demo
    decoder: {d_model: 64, pattern: [attention, mlp], repeats: 2, position: rope}
    target: attention                 # the entries that are swapped
    mixers: [deltanet, {name: mamba-8, is: mamba, d_state: 8}]
    where: [all, one, every-2]
    factors: {short_conv: [false, true], channel_mixer: [mlp, none]}
    tasks: [{name: mqar, length: 32}, {name: parity, lengths: [256], steps: 600}]
    lrs: [0.001, 0.003]
    sweep_seeds: [0, 1]
    final_seeds: [10, 11, 12]
    match: parameters
    train: {steps: 300, batch_size: 32}

`decoder` is the baseline; every mixer is put in the place of its target entries. Everything is
resolved to plain descriptions of stacks, so that a cell needs no grid to be understood.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.layers import mixer_class
from seqzoo.train.ablation.match import MODES, match
from seqzoo.train.cells import Cell
from seqzoo.train.tasks import create_task
from seqzoo.zoo.spec import DecoderSpec, stack_of

FACTORS = ("short_conv", "position", "channel_mixer", "norm")
BASELINE = "baseline"
PER_TASK = tuple(f.name for f in dataclasses.fields(Cell) if f.name not in ("decoder", "task"))
SET_BY_GRID = ("decoder", "task", "seed", "lr")


class Variant(NamedTuple):
    """One stack of the grid: what was put where, the factors, and the stack as plain data."""

    mixer: str
    where: str
    layer: int | None
    factors: dict[str, str]
    decoder: dict[str, Any]


class Study(NamedTuple):
    """A variant on a task: what a learning rate is chosen for.

    Attributes:
        variant: the stack; its width is the matched one.
        task: name and options.
        settings: fields of `Cell` for this task.
    """

    variant: Variant
    task: dict[str, Any]
    settings: dict[str, Any]

    def cell(self, lr: float, seed: int) -> Cell:
        """The cell of a learning rate and a seed."""
        decoder = self.variant.decoder
        return Cell.from_dict(
            {**self.settings, "decoder": decoder, "task": self.task, "lr": lr, "seed": seed}
        )


@dataclass(frozen=True)
class Grid:
    """What `seqzoo ablate` reads.

    Attributes:
        name: of the folder under results/.
        decoder: fields of `DecoderSpec`: the baseline.
        target: name of the entries of its pattern that are swapped.
        mixers: what they are swapped for: names, or options with a `name` of your own and `is`.
        where: `all` of them, `one` (each in turn) or `every-K`.
        factors: values to try of `short_conv` (a width-4 convolution before each target), of
            `position`, `channel_mixer` (`none` leaves them out) and `norm`; the baseline's own when
            not given.
        tasks: names and options of synthetic tasks, each with fields of `Cell` of its own.
        lrs: learning rates that are swept for every stack and task.
        sweep_seeds: seeds of the sweep.
        final_seeds: fresh seeds at the best rate; with none, the sweep's own count.
        match: `none`, or what a swapped stack shares with the baseline: `parameters`, `flops` of
            its training, or bytes of `state` after a row of the task (of causal stacks).
        tolerance: of the match, relative.
        train: fields of `Cell` for every task.

    Raises:
        ValueError: an unknown name, or a value that the decoder, a task or a cell refuses.
    """

    name: str
    decoder: dict[str, Any]
    target: str
    mixers: list[Any]
    tasks: list[dict[str, Any]]
    where: list[str] = field(default_factory=lambda: ["all"])
    factors: dict[str, list[Any]] = field(default_factory=dict)
    lrs: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2])
    sweep_seeds: list[int] = field(default_factory=lambda: [0])
    final_seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    match: str = "parameters"
    tolerance: float = 0.02
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("grid", self.name)
        for name in ("mixers", "tasks", "where", "lrs", "sweep_seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} of the grid is empty; it needs at least one")
        if self.match not in MODES:
            raise unknown("way to match", self.match, MODES)
        if self.match == "state" and not self.decoder.get("causal", True):
            raise ValueError(
                "match=state is not allowed with `causal: false`: what reads both ways carries no "
                "state; match parameters, flops or none"
            )
        check_positive(tolerance=self.tolerance)
        for factor in self.factors:
            if factor not in FACTORS:
                raise unknown("factor", factor, FACTORS)
        for option in self.train:
            if option in SET_BY_GRID or option not in PER_TASK:
                raise unknown("option of train", option, set(PER_TASK) - set(SET_BY_GRID))
        if self.target not in stack_of(self.decoder.get("pattern"), self.decoder.get("mixer")):
            names = stack_of(self.decoder.get("pattern"), self.decoder.get("mixer"))
            raise unknown("entry to swap (target)", self.target, names)
        twice = set(self.sweep_seeds) & set(self.final_seeds)
        if twice:
            raise ValueError(f"final_seeds {sorted(twice)} are not fresh: the sweep has them too")

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """From a YAML file."""
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(given if isinstance(given, dict) else {})

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Grid":
        """From plain data; what is missing takes its default."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                raise unknown("option of a grid", name, fields)
        for name in ("name", "decoder", "target", "mixers", "tasks"):
            if name not in given:
                raise ValueError(f"the grid has no {name}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, complete."""
        return dataclasses.asdict(self)

    def studies(self) -> list[Study]:
        """Every stack on every task, matched to the baseline with the same factors."""
        made = []
        for given in self.tasks:
            name, settings = str(given.get("name")), dict(self.train)
            options = {k: v for k, v in given.items() if k not in PER_TASK or k == "length"}
            settings |= {k: v for k, v in given.items() if k not in options}
            task = create_task(**options).to_dict() if "name" in given else None
            if task is None:
                raise ValueError(f"a task of the grid has no name: {given}")
            for factors in self._settings():
                base = self._stack(factors)
                for variant in self._variants(base, factors):
                    decoder = variant.decoder
                    if variant.where != BASELINE and self.match != "none":
                        label = f"{variant.mixer} ({variant.where}) on {name}"
                        decoder = match(decoder, base, task, self.match, self.tolerance, label)
                    made.append(Study(variant._replace(decoder=decoder), task, settings))
        for study in made:  # what a cell refuses is refused here
            study.cell(self.lrs[0], self.sweep_seeds[0])
        return made

    def _settings(self) -> Iterator[dict[str, str]]:
        """Every combination of factors, complete, as text for the table."""
        given = [self.factors.get(factor, [None]) for factor in FACTORS]
        for values in product(*given):
            yield dict(zip(FACTORS, values, strict=True))

    def _stack(self, factors: Mapping[str, Any]) -> dict[str, Any]:
        """The baseline with these factors, its pattern written out."""
        spec = DecoderSpec.from_dict(self.decoder)
        names = [name for name in spec.names() if name == self.target or self._kept(name, factors)]
        other = factors["channel_mixer"]
        pattern = []
        for name in names:
            if name == self.target and factors["short_conv"]:
                pattern.append("short_conv")
            swapped = other is not None and name != self.target and self._is_channel(name)
            pattern.append(str(other) if swapped else name)
        changes = {k: factors[k] for k in ("position", "norm") if factors[k] is not None}
        changes = {k: None if v == "none" else v for k, v in changes.items()}
        stack = {**spec.to_dict(), "pattern": pattern, "mixer": None, "repeats": 1, "swap": {}}
        return {**stack, **changes}

    def _kept(self, name: str, factors: Mapping[str, Any]) -> bool:
        if name == "short_conv" and factors["short_conv"] is not None:
            return False  # put back before each target where the factor says so
        return not (factors["channel_mixer"] == "none" and self._is_channel(name))

    def _is_channel(self, name: str) -> bool:
        options = self.decoder.get("options", {})
        return mixer_class(options.get(name, {}).get("is", name)).kind == "channel"

    def _variants(self, base: dict[str, Any], factors: Mapping[str, Any]) -> Iterator[Variant]:
        labels = _labels(base, factors)
        yield Variant(self.target, BASELINE, None, labels, base)
        places = [i for i, name in enumerate(base["pattern"]) if name == self.target]
        for mixer, where in product(self.mixers, self.where):
            name, options = _mixer(mixer)
            for layer, chosen in _chosen(where, places):
                decoder = {**base, "swap": {str(i): name for i in chosen}}
                if options:
                    decoder["options"] = {**base["options"], name: options}
                DecoderSpec.from_dict(decoder)
                yield Variant(name, where, layer, labels, decoder)


def check_name(what: str, name: str) -> None:
    """Refuse what is no plain name for a folder."""
    if not name or any(not (c.isalnum() or c in "._-") for c in name) or name.startswith("."):
        raise ValueError(f"{what} name {name!r} is not allowed; letters, digits, . _ and - are")


def _mixer(given: Any) -> tuple[str, dict[str, Any]]:  # noqa: ANN401  # as YAML has it
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or "name" not in given:
        raise ValueError(f"mixer {given} of the grid is neither a name nor options with a name")
    options = {k: v for k, v in given.items() if k != "name"}
    return str(given["name"]), options


def _chosen(where: str, places: list[int]) -> Iterator[tuple[int | None, list[int]]]:
    """Which of the target's places are swapped together."""
    if where == "all":
        yield None, places
    elif where == "one":
        yield from ((place, [place]) for place in places)
    elif where.startswith("every-") and where[6:].isdigit() and int(where[6:]) > 0:
        step = int(where[6:])
        if step > len(places):
            raise ValueError(f"where {where} leaves no entry to swap; the target has {len(places)}")
        yield None, places[step - 1 :: step]
    else:
        raise ValueError(f"where {where!r} is not allowed; it is all, one, or every-K (every-2)")


def _labels(base: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, str]:
    """The factors of a stack in words, those not varied as the baseline has them."""
    names = base["pattern"]
    channel = [n for n in names if n != "short_conv" and _kind(base, n) == "channel"]
    position = base["position"]
    return {
        "short_conv": "yes" if "short_conv" in names else "no",
        "position": str(position["name"] if isinstance(position, dict) else position or "none"),
        "channel_mixer": "+".join(dict.fromkeys(channel)) or "none",
        "norm": str(base["norm"]),
    }


def _kind(base: Mapping[str, Any], name: str) -> str:
    return mixer_class(base["options"].get(name, {}).get("is", name)).kind
