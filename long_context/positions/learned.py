"""Learned positions, added to the token embedding: e(n) is row n of a table.

Gehring et al., 2017, arXiv:1705.03122, section 3.1; as in GPT-2. What the table has no row for
cannot be placed: longer sequences are refused.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from seqzoo.kernels.errors import check_positive
from seqzoo.layers.position import Position


class Learned(Position):
    """A table of position embeddings.

    Args:
        d_model: width D.
        max_length: rows of the table.
    """

    hooks: ClassVar[tuple[str, ...]] = ("embed",)

    def __init__(self, d_model: int, *, max_length: int | None = None) -> None:
        super().__init__()
        if max_length is None:
            raise ValueError("position 'learned' needs max_length, the rows of its table")
        check_positive(d_model=d_model, max_length=max_length)
        self.weight = nn.Parameter(torch.empty(max_length, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as in GPT-2."""
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Position.embed`.

        Raises:
            ValueError: a token beyond the table. Compiled code cannot look, and leaves it to the
                lookup.
        """
        if mask is not None:
            positions = torch.where(mask, positions, 0)
        traced = positions.is_meta or torch.compiler.is_compiling()
        if not traced and positions.numel() and int(positions.max()) >= len(self.weight):
            raise ValueError(
                f"a sequence of {int(positions.max()) + 1} tokens is longer than"
                f" max_length={len(self.weight)} of position 'learned'"
            )
        return embedding(positions, self.weight)
