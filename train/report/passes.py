"""The three passes that are measured: forward, training and the next token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.train.bench.measure import training_step
from seqzoo.zoo.base import ZooPreTrainedModel
from seqzoo.zoo.cache import ZooCache
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.model import ZooForCausalLM, ZooForSequenceClassification

PHASES = ("forward", "train", "decode")
PIECE = 64  # tokens at once while a cache is filled: the peak is then the cache's, not the pass's


class Stack(NamedTuple):
    """Plain data of a model: fields of `DecoderSpec`, and how many tokens there are."""

    decoder: dict[str, Any]
    vocab_size: int

    @property
    def phases(self) -> tuple[str, ...]:
        """What can be measured; a stack that reads both ways decodes nothing."""
        return PHASES if self.decoder.get("causal", True) else PHASES[:2]


def build(stack: Stack) -> ZooPreTrainedModel:
    """The model, with weights of seed 0: of language, or where it reads both ways a classifier."""
    torch.manual_seed(0)
    causal = stack.decoder.get("causal", True)
    kind = ZooForCausalLM if causal else ZooForSequenceClassification
    model: ZooPreTrainedModel = kind(ZooConfig(decoder=stack.decoder, vocab_size=stack.vocab_size))
    model.train(False)
    return model


def tokens(stack: Stack, batch_size: int, length: int) -> Tensor:
    """Random ids, (B, T)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(stack.vocab_size, (batch_size, length), generator=generator)


def step_of(model: ZooPreTrainedModel, phase: str, ids: Tensor) -> Callable[[], object]:
    """What is clocked again and again; for decoding the cache is filled here, and goes on growing.

    Args:
        model: of `build`.
        phase: one of the stack's.
        ids: (B, T).
    """
    if phase == "train":
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        return training_step(lambda: _logits(model, ids), parameters)
    if phase == "forward":
        return torch.no_grad()(lambda: _logits(model, ids))
    cache, last = filled(model, ids), ids[:, -1:]
    return torch.no_grad()(lambda: model(last, past_key_values=cache, use_cache=True))


def run_once(model: ZooPreTrainedModel, phase: str, ids: Tensor) -> None:
    """The pass, with what it needs before it."""
    if phase == "train":
        model.train()
        _logits(model, ids).sum().backward()  # type: ignore[no-untyped-call]
        model.train(False)
    else:
        step_of(model, phase, ids)()


@torch.no_grad()
def filled(model: ZooPreTrainedModel, ids: Tensor) -> ZooCache:
    """A cache that has seen the tokens."""
    cache = ZooCache()
    for piece in torch.split(ids, PIECE, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _logits(model: ZooPreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits
