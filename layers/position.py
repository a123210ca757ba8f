"""How attention knows where tokens are: a null object with hooks, and the catalogue of schemes.

A scheme fills one hook, names it in `hooks`, and lives in `seqzoo.long_context.positions`; its name
is resolved on use, so nothing here imports upwards.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqzoo.kernels.errors import unknown

CATALOGUE: dict[str, str] = {
    "alibi": "seqzoo.long_context.positions.alibi:ALiBi",
    "learned": "seqzoo.long_context.positions.learned:Learned",
    "none": "seqzoo.layers.position:Position",
    "rope": "seqzoo.long_context.positions.rope:RoPE",
    "sinusoidal": "seqzoo.long_context.positions.sinusoidal:Sinusoidal",
    "xpos": "seqzoo.long_context.positions.xpos:XPos",
}


class Position(nn.Module):
    """No positions at all, and the base of every scheme.

    Positions are int64 indices within a document. Whatever follows from integers is derived where
    it is used, in float32 or wider: a buffer would be rounded by `.to(bfloat16)`.

    Attributes:
        hooks: which hooks the scheme fills; callers skip the work for the others.
    """

    hooks: ClassVar[tuple[str, ...]] = ()

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn queries (B, T, H, K) and keys (B, S, G, K).

        Args:
            q: queries, which stand in the last T of the S slots.
            k: keys.
            positions: (B, S), or (1, S) for all rows.
        """
        return q, k

    def bias(self, distance: Tensor) -> Tensor:
        """Added to the scores: int64 (..., T, S), query minus key, to float (..., H, T, S)."""
        return torch.zeros_like(distance, dtype=torch.float32)[..., None, :, :]

    def bias_from(
        self, q: Tensor, k: Tensor, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor | None:
        """Added to the scores, (B, H, T, S), where what is there decides (`rotate`'s arguments).

        Args:
            q: queries.
            k: keys.
            positions: (B, S).
            mask: (B, S) bool, False = the token is not there.
        """
        return None

    def embed(self, positions: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Added to the token embedding by the model: (B, T) to (B, T, D), float32 or wider.

        Args:
            positions: (B, T).
            mask: (B, T) bool; what stands at False tokens means nothing.
        """
        return None

    def reset_parameters(self) -> None:
        """Initialise every parameter of the scheme."""


def position_class(name: str) -> type[Position]:
    """The class behind a name or a `module:Class` path.

    Raises:
        ValueError: no such name, module or class.
    """
    path = name if ":" in name else CATALOGUE.get(name)
    if path is None:
        raise unknown("position", name, CATALOGUE)
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"position {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Position)):
        raise ValueError(f"position {name!r} is not a Position class; see seqzoo.layers.position")
    return found


def create_position(
    spec: str | Mapping[str, Any],
    *,
    n_heads: int,
    head_dim: int,
    d_model: int,
    max_length: int | None = None,
    causal: bool = True,
) -> Position:
    """Build a scheme from a name, or from a name and options: `{name: rope, base: 500000.0}`.

    A scheme's constructor takes its options as keywords, and of the arguments here those that it
    names.

    Raises:
        ValueError: an unknown name or option, or a value that the scheme refuses.
    """
    given: dict[str, Any] = {
        "n_heads": n_heads,
        "head_dim": head_dim,
        "d_model": d_model,
        "max_length": max_length,
        "causal": causal,
    }
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise ValueError(f"position {options} has no name; write {{name: rope, ...}}")
    name = options.pop("name")
    cls = position_class(name)
    if cls is Position:
        parameters: Mapping[str, inspect.Parameter] = {}
    else:
        parameters = inspect.signature(cls).parameters
    allowed = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise unknown(f"option of position {name!r} named", option, allowed)
    return cls(**{n: given[n] for n in parameters if n in given} | options)
