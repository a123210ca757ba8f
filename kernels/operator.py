"""A computation as an operator of torch: a schema, shapes without numbers, gradients.

As `torch.library.custom_op` without mutated arguments, whose first call in a process imports all of
torch's compiler, a second for nothing.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor


class Operator:
    """Call it with the arguments of `compute`, whose annotations are the schema.

    A name that torch has already is taken as it stands: the same code was loaded from elsewhere, as
    when two exported models of one architecture meet (their names hold a digest of the code).
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.name = name
        namespace, _, word = name.partition("::")
        self.known = hasattr(getattr(torch.ops, namespace), word)
        if not self.known:
            torch.library.define(name, torch.library.infer_schema(compute, mutates_args=()))
            torch.library.impl(name, "CompositeExplicitAutograd", compute)
        self._run = getattr(getattr(torch.ops, namespace), word).default

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401
        """As annotated in `compute`."""
        return self._run(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> None:
        """Decorate the function that returns empty outputs."""
        if not self.known:
            torch.library.register_fake(self.name, shapes)

    def register_autograd(
        self, differentiate: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As of `torch.library`: gradients from (ctx, *gradients of the outputs)."""
        if not self.known:
            torch.library.register_autograd(self.name, differentiate, setup_context=setup_context)


def operator(name: str, *, like: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate a computation that writes into none of its arguments and returns none of them.

    `like` names, for each output, the argument whose shape and dtype it has; without it,
    `register_fake` says what comes out.
    """

    def decorate(compute: Callable[..., Any]) -> Operator:
        made, names = Operator(name, compute), list(signature(compute).parameters)
        if like:
            places = [names.index(argument) for argument in like]
            made.register_fake(lambda *given: _empty([given[i] for i in places]))
        return made

    return decorate


def _empty(outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs)
    return found if len(found) > 1 else found[0]
