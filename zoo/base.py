"""What every model of the zoo is and returns, and how its weights begin."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from seqzoo.zoo.cache import ZooCache
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.seeds import seeded


@dataclass
class ZooOutput(ModelOutput):
    """What the models return; fields that were not asked for are None.

    Attributes:
        loss: of the labels; in training with `aux_loss` added.
        logits: (B, T, V) or (B, labels).
        last_hidden_state: (B, T, D) after the final norm.
        past_key_values: the cache, with this pass taken in.
        hidden_states: the stream before each entry, and the last hidden state.
        aux_loss: sum of what mixers want added to the training loss.
        stats: numbers worth logging, by entry and name: `3.load`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: ZooCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    stats: dict[str, Tensor] | None = None


class ZooPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What all three models share: configuration, initialisation, and what transformers asks."""

    config_class = ZooConfig
    config: ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Entry"]  # noqa: RUF012  # transformers' own declaration
    _is_stateful = True  # no rollback: assisted decoding is refused instead of diverging

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every module starts as it would alone, from its own stream; what was loaded stays.

        transformers protects loaded tensors from `torch.nn.init` only, while mixers also fill their
        parameters by copying.
        """
        tensors = [*module.parameters(), *module.buffers()]
        loaded = [x for x in tensors if getattr(x, "_is_hf_initialized", False)]
        if len(loaded) == len(tensors):
            return
        kept = [(x, x.clone()) for x in loaded]
        seed = getattr(module, "init_seed", None)
        with nullcontext() if seed is None else seeded(seed):
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for x, value in kept:
            x.copy_(value)
