"""Pretraining on the task's own inputs, before its labels are looked at.

Trained from nothing on labels alone, Transformers look far worse on Long-Range Arena than they are;
the same steps spent on the same inputs first close most of the gap. Amos, Berant and Gupta, 2024,
arXiv:2310.02980.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.train.lra.models import embed, rows
from seqzoo.zoo.base import ZooOutput, ZooPreTrainedModel
from seqzoo.zoo.config import DecoderSpec
from seqzoo.zoo.inputs import make_context
from seqzoo.zoo.losses import next_token_loss, with_auxiliary

OBJECTIVES = ("masked", "causal")
Batch = dict[str, Tensor]


def check_pretraining(
    decoder: DecoderSpec, objective: str | None, steps: int, rate: float | None
) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: the option, its value and what is allowed.
    """
    check_positive(pretrain_steps=steps)
    if objective is not None and objective not in OBJECTIVES:
        raise unknown("self_pretrain", objective, OBJECTIVES)
    if objective == "causal" and not decoder.causal:
        raise ValueError(
            "self_pretrain=causal is not allowed: this decoder reads both ways; take masked, or a "
            "decoder with `causal: true`"
        )
    if rate is not None and not 0 < rate < 1:
        raise ValueError(f"pretrain_rate={rate} is not allowed; it must be between 0 and 1")


class SelfPretraining(nn.Module):
    """A head that tells tokens, and the vector that stands where one is hidden.

    - masked: a share of the real tokens is hidden; each is to be told from all others.
    - causal: the next token is to be told from those before it.

    Args:
        objective: `masked` or `causal`.
        d_model: width D of the stack.
        vocab_size: number of token ids.
    """

    def __init__(self, objective: str, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.objective = objective
        self.head = nn.Linear(d_model, vocab_size)
        self.hidden_token = nn.Parameter(torch.randn(d_model) * 0.02)
        if objective == "causal":
            self.hidden_token.requires_grad_(False)

    def forward(self, network: ZooPreTrainedModel, batch: Batch, rate: float) -> ZooOutput:
        """The loss on a batch of the task.

        Args:
            network: whose stack is trained.
            batch: `input_ids`, (B, T) or (B, 2, T), `attention_mask`, and `pixel_values` perhaps.
            rate: share of the tokens that is hidden.
        """
        ids, real = rows(batch["input_ids"]), rows(batch["attention_mask"])
        x = embed(network, batch)
        stack: Any = network.model
        if self.objective == "causal":
            out: ZooOutput = stack(inputs_embeds=x, attention_mask=real, use_cache=False)
            last = cast(Tensor, out.last_hidden_state)
            loss = next_token_loss(self.head(last), ids, make_context(last, None, real))
        else:
            hidden = (torch.rand(ids.shape, device=ids.device) < rate) & (real != 0)
            x = torch.where(hidden[..., None], self.hidden_token.to(x.dtype), x)
            out = stack(inputs_embeds=x, attention_mask=real, use_cache=False)
            logits = self.head(cast(Tensor, out.last_hidden_state)[hidden]).float()
            total = cross_entropy(logits, ids[hidden], reduction="sum")
            loss = total / hidden.sum().clamp(min=1)
        out.loss = with_auxiliary(loss, out.aux_loss, True)
        return out
