"""What a stack costs, and a stack of another mixer made to cost the same."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from seqzoo.layers import mixer_info
from seqzoo.train.cells import build_network
from seqzoo.train.tasks import create_task
from seqzoo.zoo.spec import DecoderSpec
from seqzoo.zoo.stack import Entry

MODES = ("none", "parameters", "flops", "state")
STEP = 8  # widths are tried in multiples of this
LEAST, MOST = 0.5, 2.0  # times the baseline's width
STATES = 1024  # the most states a channel that are tried


class Figures(NamedTuple):
    """What a stack costs on a task.

    Attributes:
        parameters: trainable scalars of the whole model; `mixer_parameters`: of its mixers.
        state_bytes: of one row's state after a row of the task, in float32.
        flops: of the matrix products of one forward pass over one row, the head's included.
    """

    parameters: int
    mixer_parameters: int
    state_bytes: int
    flops: int


def figures(decoder: Mapping[str, Any], task: Mapping[str, Any]) -> Figures:
    """Count, without memory for weights."""
    made, spec = create_task(**task), DecoderSpec.from_dict(decoder)
    with torch.device("meta"):
        network = build_network(spec, made)
    entries = [module for module in network.modules() if isinstance(module, Entry)]
    costs = [entry.mixer.cost(made.length) for entry in entries]
    # A pooled row has one row of logits, others one at each token.
    head = 2 * spec.d_model * (made.n_classes or made.length * made.vocab_size)
    return Figures(
        sum(p.numel() for p in network.parameters()),
        sum(cost.parameters for cost in costs),
        sum(cost.state_bytes for cost in costs),
        sum(cost.flops for cost in costs) + head,
    )


def match(
    decoder: dict[str, Any],
    base: Mapping[str, Any],
    task: Mapping[str, Any],
    mode: str,
    tolerance: float,
    label: str,
) -> dict[str, Any]:
    """The stack with the width at which it costs what the baseline does.

    Parameters and FLOPs: the width, and where its steps are too coarse the hidden width of the
    channel mixers. State: the states a channel of the swapped mixer, or the width where it has no
    `d_state`.

    Raises:
        ValueError: nothing comes within the tolerance; the nearest is named.
    """
    read: Callable[[Figures], int] = {
        "parameters": lambda f: f.parameters,
        "flops": lambda f: f.flops,
        "state": lambda f: f.state_bytes,
    }[mode]
    wanted = read(figures(base, task))
    known: dict[str, float] = {}  # the search comes back to the same stacks

    def off(stack: Mapping[str, Any]) -> float:
        name = str(stack)
        if name not in known:
            try:
                found = read(figures(stack, task))
                known[name] = found / wanted - 1 if wanted else float(found != wanted)
            except ValueError:  # heads that do not divide this width
                known[name] = float("inf")
        return known[name]

    best = _nearest(decoder, "d_state", off, STATES) if mode == "state" else None
    if best is None:
        widths = [{**decoder, "d_model": width} for width in _widths(base["d_model"])]
        ranked = sorted(widths, key=lambda stack: abs(off(stack)))
        best = ranked[0]
        for stack in ranked[:4]:
            if abs(off(best)) <= tolerance or mode == "state":
                break
            finer = _nearest(stack, "hidden", off, 16 * stack["d_model"])
            best = min(best, finer or best, key=lambda s: abs(off(s)))
    if abs(off(best)) > tolerance:
        raise ValueError(
            f"{label}: no width matches the baseline's {mode} within {tolerance:.0%}; the nearest, "
            f"d_model={best['d_model']}, is {off(best):+.1%} off. Give the stack a channel mixer, "
            "whose hidden width closes the gap, or raise `tolerance`"
        )
    return best


def _widths(d_model: int) -> Iterator[int]:
    first = max(STEP, int(d_model * LEAST) // STEP * STEP)
    yield from range(first, int(d_model * MOST) + 1, STEP)


def _nearest(
    stack: dict[str, Any], option: str, off: Callable[[Mapping[str, Any]], float], most: int
) -> dict[str, Any] | None:
    """The stack with `d_state` of swapped mixers, or `hidden` of others, where it is nearest.

    By halving, since costs grow with both; None when there is nothing to turn.
    """
    swapped = set(stack["swap"].values())
    names = swapped if option == "d_state" else set(stack["pattern"]) - swapped
    given = {name: {"is": name, **stack["options"].get(name, {})} for name in sorted(names)}
    turned = [n for n, own in given.items() if option in mixer_info(own["is"]).options]
    if not turned or (option == "d_state" and len(turned) < len(given)):
        return None

    def at(number: int) -> dict[str, Any]:
        options = {name: {**given[name], option: number} for name in turned}
        return {**stack, "options": {**stack["options"], **options}}

    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if off(at(middle)) >= 0 else (middle + 1, high)
    return min(at(low), at(max(1, low - 1)), key=lambda s: abs(off(s)))
