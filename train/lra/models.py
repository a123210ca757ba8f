"""The two models of Long-Range Arena that a plain classifier does not cover."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from seqzoo.zoo.base import ZooOutput, ZooPreTrainedModel
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.inputs import make_context
from seqzoo.zoo.losses import pool, with_auxiliary
from seqzoo.zoo.model import ZooForSequenceClassification, ZooModel


class ZooForRetrieval(ZooPreTrainedModel):  # type: ignore[no-untyped-call]
    """Two documents through one stack, each pooled alone; a head compares the two vectors.

        logits = W_2 relu(W_1 [x1, x2, x1 * x2, x1 - x2] + b_1) + b_2

    As Long-Range Arena demands, no token of one document sees the other (arXiv:2011.04006,
    section 2.2.3).
    """

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        width = self.model.spec.d_model
        self.compare = nn.Linear(4 * width, width)
        self.score = nn.Linear(width, cast(int, config.num_labels))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> ZooOutput:
        """Compare the documents of each row.

        Args:
            input_ids: (B, 2, T).
            attention_mask: (B, 2, T); 0 = the token is not there.
            labels: (B,) classes.
            use_cache: ignored; there is no cache.

        Returns:
            `logits` (B, labels) and what was asked for.

        Raises:
            ValueError: no pairs.
        """
        if input_ids.ndim != 3 or input_ids.shape[1] != 2:
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}; it must be (B, 2, T)")
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        out: ZooOutput = self.model(input_ids.flatten(0, 1), mask, use_cache=False)
        hidden = cast(Tensor, out.last_hidden_state)
        pooled = pool(hidden, make_context(hidden, None, mask))
        x1, x2 = pooled.view(len(input_ids), 2, -1).unbind(1)
        both = self.compare(torch.cat([x1, x2, x1 * x2, x1 - x2], -1))
        out.logits = cast(Tensor, self.score(relu(both)))
        return _with_loss(out, labels, self.training)


class ZooForPixels(ZooForSequenceClassification):
    """A classifier of real numbers: a linear map of each takes the embedding's place."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Linear(1, self.model.spec.d_model)
        self.model.embed_tokens.requires_grad_(False)  # never looked at
        self.post_init()  # type: ignore[no-untyped-call]

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, T) numbers to (B, T, D)."""
        return cast(Tensor, self.encoder(pixel_values[..., None]))

    def forward(  # type: ignore[override]  # pixels instead of tokens
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> ZooOutput:
        """Classify each row.

        Args:
            pixel_values: (B, T).
            attention_mask: (B, T); 0 = the number is not there.
            labels: (B,) classes.
            input_ids: ignored: the same pixels as 8-bit numbers.
            use_cache: ignored; there is no cache.

        Returns:
            `logits` (B, labels) and what was asked for.
        """
        out: ZooOutput = super().forward(None, attention_mask, self.embed(pixel_values))
        return _with_loss(out, labels, self.training)


def embed(network: ZooPreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What the stack reads of a batch, (N, T, D); documents of pairs one below the other."""
    if isinstance(network, ZooForPixels):
        return network.embed(batch["pixel_values"])
    stack: Any = network.model
    return cast(Tensor, stack.embed_tokens(rows(batch["input_ids"])))


def rows(x: Tensor) -> Tensor:
    """(B, T) as it is, (B, 2, T) as (2 B, T)."""
    return x.flatten(0, -2)


def _with_loss(out: ZooOutput, labels: Tensor | None, training: bool) -> ZooOutput:
    if labels is not None:
        loss = cross_entropy(cast(Tensor, out.logits).float(), labels)
        out.loss = with_auxiliary(loss, out.aux_loss, training)
    return out
