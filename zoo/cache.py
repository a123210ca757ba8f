"""What a model carries from pass to pass: one mixer state per entry of the stack.

transformers' own caches know keys and values, and one convolution; a mixer's state here is any
NamedTuple of tensors with the batch in dim 0, which is all that generation needs.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import Cache

from seqzoo.layers.base import State


class ZooCache(Cache):
    """One State per entry, the number of tokens seen, and where each row's document stands.

    A pass changes the cache it was given and returns it, as transformers' caches do. An empty one
    is filled by the first pass.

    Attributes:
        states: by entry; empty before the first pass.
        seen: columns so far, padding included: what an attention mask must cover.
        last_document: (B,) id of each row's last real token, when documents were given.
        index: (B,) index of each row's next token in its document, when positions are embedded.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.seen = 0
        self.last_document: Tensor | None = None
        self.index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"ZooCache(entries={len(self)}, seen={self.seen}, bytes={self.state_bytes()})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included, whatever the entry."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of what a pass of `query_length` tokens sees."""
        return self.seen + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether a pass has filled the cache."""
        return bool(self.states)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 when nothing says so."""
        return next(
            (len(leaf) for leaf in tree_leaves(self._held()) if isinstance(leaf, Tensor)), -1
        )

    @property
    def is_croppable(self) -> bool:
        """False: a recurrence cannot be run backwards."""
        return False

    def state_bytes(self) -> int:
        """Bytes that the states hold."""
        leaves = tree_leaves(self.states)
        return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))

    def reset(self) -> None:
        """Empty it, as if it were new."""
        self.states, self.seen, self.last_document, self.index = [], 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row, `repeats` times in a row."""
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names or marks."""
        self._apply(lambda x: x[indices.to(x.device)])

    def detach_(self) -> None:
        """Cut the states from the graph, for truncated backpropagation through time."""
        self._apply(torch.Tensor.detach)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: a state cannot give tokens back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a ZooCache cannot be cropped: recurrent states cannot forget their last tokens; copy"
            " the cache before the tokens that may be taken back"
        )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401  # Cache's signature
        """Refused: there are no keys and values to add to; the model replaces whole states.

        Raises:
            TypeError: always.
        """
        raise TypeError("a ZooCache holds mixer states; it takes no keys and values")

    def _held(self) -> tuple[Any, ...]:
        return self.states, self.last_document, self.index

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states, self.last_document, self.index = tree_map_only(Tensor, change, self._held())
