"""From what Hugging Face passes to what mixers share: masks, documents, positions."""

import torch
from torch import Tensor

from seqzoo.layers.base import Context
from seqzoo.zoo.cache import ZooCache


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids that the embedding does not have, where looking costs next to nothing.

    Raises:
        ValueError: an id below 0 or from `vocab_size` on, on the CPU and outside of compilation.
    """
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu" or not input_ids.numel():
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside of the vocabulary, 0 to {vocab_size - 1}")


def make_context(
    x: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    document_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: ZooCache | None = None,
) -> Context:
    """What a pass over `x` (B, T, D) shares with every layer.

    Masks, documents and positions may cover the tokens in the cache too; the last T columns count.

    Raises:
        ValueError: one of them does not fit.
    """
    mask = _latest("attention_mask", attention_mask, x)
    if mask is not None:
        mask = mask != 0
        if not torch.compiler.is_compiling() and mask.device.type != "meta" and bool(mask.all()):
            mask = None
    return Context(
        mask=mask,
        document=_latest("document_ids", document_ids, x),
        last_document=None if cache is None else cache.last_document,
        positions=_latest("position_ids", position_ids, x),
        token_ids=input_ids,
    )


def last_document(ctx: Context) -> Tensor | None:
    """(B,) the document of each row's last real token, counting those before the pass."""
    before, document, mask = ctx.last_document, ctx.document, ctx.mask
    if document is None or document.shape[1] == 0:
        return before
    if mask is None:
        return document[:, -1]
    T = document.shape[1]
    slots = torch.arange(T, device=mask.device).expand_as(mask)
    latest = torch.where(mask, slots, -1).max(dim=1).values
    found = document.gather(1, latest.clamp(min=0)[:, None])[:, 0]
    return found if before is None else torch.where(latest < 0, before, found)


def _latest(name: str, given: Tensor | None, x: Tensor) -> Tensor | None:
    if given is None:
        return None
    B, T = x.shape[:2]
    if given.ndim != 2 or given.shape[0] not in (1, B) or given.shape[1] < T:
        raise ValueError(
            f"{name} is {tuple(given.shape)}; it must be (B, T) = {(B, T)}, or longer by the tokens"
            " in the cache"
        )
    return given[:, given.shape[1] - T :].expand(B, T)
