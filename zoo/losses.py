"""From hidden states to what is minimised, with masked tokens counting for nothing."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seqzoo.layers.base import Context

IGNORED = -100  # the label that counts for nothing, as everywhere in Hugging Face


def next_token_loss(
    logits: Tensor, labels: Tensor, ctx: Context, n_labels: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of each token given those before it, in float32.

    A target does not count when its label is -100, when it or the token before it is masked, or
    when it begins another document. Where none counts the loss is 0.

    Args:
        logits: (B, T, V).
        labels: (B, T), the token ids themselves; they are shifted here.
        ctx: of the pass.
        n_labels: what to divide the sum by; the number of targets when None.
    """
    logits, targets = logits[:, :-1], labels[:, 1:]
    if ctx.mask is not None:
        targets = targets.masked_fill(~(ctx.mask[:, 1:] & ctx.mask[:, :-1]), IGNORED)
    if ctx.reset is not None:
        targets = targets.masked_fill(ctx.reset[:, 1:], IGNORED)
    total = cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (targets != IGNORED).sum() if n_labels is None else torch.as_tensor(n_labels)
    return total / count.to(total.device).clamp(min=1)


def pool(x: Tensor, ctx: Context) -> Tensor:
    """Mean over real tokens, (B, T, D) -> (B, D); 0 for a row without any."""
    if ctx.mask is None:
        return x.sum(1) / max(x.shape[1], 1)
    total = torch.where(ctx.mask[..., None], x, 0).sum(1)
    return total / ctx.mask.sum(1, keepdim=True).clamp(min=1)


def with_auxiliary(loss: Tensor, auxiliary: Tensor | None, training: bool) -> Tensor:
    """What is minimised: in training the loss and what mixers want added, else the loss alone."""
    return loss + auxiliary if training and auxiliary is not None else loss
