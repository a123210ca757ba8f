"""The decoder template and its Hugging Face classes: one model for every architecture."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
)

from seqzoo.zoo.base import ZooOutput as ZooOutput
from seqzoo.zoo.base import ZooPreTrainedModel as ZooPreTrainedModel
from seqzoo.zoo.cache import ZooCache
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.inputs import check_ids, last_document, make_context
from seqzoo.zoo.losses import next_token_loss, pool, with_auxiliary
from seqzoo.zoo.seeds import derive, draw
from seqzoo.zoo.stack import Entry, make_norm


class ZooModel(ZooPreTrainedModel):  # type: ignore[no-untyped-call]
    """The stack without a head: token embedding, entries, final norm.

    Args:
        config: its `decoder` says what stands in the stack.

    Raises:
        ValueError: a description that `DecoderSpec` refuses.
    """

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        spec = self.spec = config.spec
        seed = draw()
        self.embed_tokens = nn.Embedding(config.vocab_size, spec.d_model)
        self.position = spec.build_position()
        self.dropout = nn.Dropout(spec.dropout)
        self.entries = nn.ModuleList(
            Entry(spec, entry, derive(seed, i)) for i, entry in enumerate(spec.resolve())
        )
        self.norm = make_norm(spec)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,  # noqa: ANN401  # Hugging Face passes whatever else it has
    ) -> ZooOutput:
        """Run the stack.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), or (B, seen + T) with a cache; 0 = the token is not there.
            position_ids: (B, T); counted in real tokens, by document, when None.
            past_key_values: where the pass before left off.
            inputs_embeds: (B, T, D) instead of `input_ids`.
            document_ids: (B, T) ids of packed documents.
            seq_idx: the same, under the name that transformers' collators give it.
            use_cache: return a cache; by default as configured, and never in training.
            output_hidden_states: return the stream before each entry.
            kwargs: ignored.

        Returns:
            `last_hidden_state` and what was asked for.

        Raises:
            ValueError: inputs that do not fit together, or ids outside of the vocabulary.
        """
        x = self._embed(input_ids, inputs_embeds)
        cache = self._cache(x, past_key_values, use_cache)
        documents = seq_idx if document_ids is None else document_ids
        ctx = make_context(x, input_ids, attention_mask, documents, position_ids, cache)
        if ctx.mask is not None:
            x = torch.where(ctx.mask[..., None], x, 0)
        index = None
        if self.position is not None:
            start = None if cache is None else cache.index
            positions = ctx.index(x, start)
            x = x + cast(Tensor, self.position.embed(positions, ctx.mask)).to(x.dtype)
            index = ctx.next_index(positions, start)
        x = self.dropout(x)
        stream, states = [x], []
        for i, entry in enumerate(self.entries):
            state = None if cache is None else cache.states[i]
            x, state, shared, losses, stats = entry(x, state, ctx)
            ctx = replace(ctx, shared=shared)  # the old one is what a recomputed entry must see
            states.append(state)
            stream.append(x)
            ctx.losses |= {f"{i}.{name}": loss for name, loss in losses.items()}
            ctx.stats |= {f"{i}.{name}": number for name, number in stats.items()}
        x = self.norm(x)
        if cache is not None:
            cache.states, cache.index = states, index
            cache.seen, cache.last_document = cache.seen + x.shape[1], last_document(ctx)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return ZooOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*stream[:-1], x) if output_hidden_states else None,
            aux_loss=torch.stack([*ctx.losses.values()]).sum() if ctx.losses else None,
            stats=ctx.stats or None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        if inputs_embeds is not None or input_ids is None:
            raise ValueError("give either input_ids or inputs_embeds")
        check_ids(input_ids, self.embed_tokens.num_embeddings)
        return cast(Tensor, self.embed_tokens(input_ids))

    def _cache(self, x: Tensor, given: ZooCache | None, use_cache: bool | None) -> ZooCache | None:
        if use_cache is None:
            use_cache = self.config.use_cache and self.spec.causal and not self.training
        if given is None and not use_cache:
            return None
        if not self.spec.causal:
            raise ValueError("a bidirectional stack has no cache; pass use_cache=False")
        cache = ZooCache() if given is None else given
        if not isinstance(cache, ZooCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; it must be a ZooCache")
        if not cache.states:
            cache.states = [
                cast(Entry, entry).mixer.init_state(x.shape[0], device=x.device, dtype=x.dtype)
                for entry in self.entries
            ]
        return cache


class ZooForCausalLM(ZooPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The stack with a language-model head.

    Raises:
        ValueError: a description with `causal: false`, or one that `DecoderSpec` refuses.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        if not self.model.spec.causal:
            raise ValueError("a language model needs `causal: true`; this decoder reads both ways")
        self.lm_head = nn.Linear(self.model.spec.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> ZooOutput:
        """Predict the next token; see `ZooModel.forward` for what is not named here.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) or (B, seen + T).
            position_ids: (B, T).
            past_key_values: the cache.
            inputs_embeds: (B, T, D).
            labels: (B, T), unshifted; see `next_token_loss` for what counts.
            document_ids: (B, T).
            seq_idx: (B, T).
            use_cache: return a cache.
            output_hidden_states: return the stream.
            logits_to_keep: the last so many positions, or the positions themselves; 0 keeps all.
            num_items_in_batch: what the sum of the loss is divided by.
            kwargs: ignored.

        Returns:
            `logits` and what was asked for.
        """
        out: ZooOutput = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            document_ids,
            seq_idx,
            use_cache,
            output_hidden_states,
        )
        keep = (
            slice(-logits_to_keep or None, None)
            if isinstance(logits_to_keep, int)
            else logits_to_keep
        )
        hidden = cast(Tensor, out.last_hidden_state)
        out.logits = cast(Tensor, self.lm_head(hidden[:, keep]))
        if labels is not None:
            documents = seq_idx if document_ids is None else document_ids
            ctx = make_context(hidden, None, attention_mask, documents)
            loss = next_token_loss(out.logits, labels, ctx, num_items_in_batch)
            out.loss = with_auxiliary(loss, out.aux_loss, self.training)
        return out

    def _prepare_position_ids_for_generation(self, *args: Any) -> None:  # noqa: ANN401
        """None: the stack counts real tokens itself, by document, and across passes."""


class ZooForSequenceClassification(ZooPreTrainedModel):  # type: ignore[no-untyped-call]
    """The stack, the mean of its real tokens, and a linear head; causal or not.

    Raises:
        ValueError: a description that `DecoderSpec` refuses.
    """

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        self.score = nn.Linear(self.model.spec.d_model, cast(int, config.num_labels))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> ZooOutput:
        """Classify each row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T); 0 = the token is not there.
            inputs_embeds: (B, T, D).
            labels: (B,) classes, or (B,) or (B, labels) numbers; `config.problem_type` says which.
            output_hidden_states: return the stream.
            kwargs: passed to the loss.

        Returns:
            `logits` (B, labels) and what was asked for.
        """
        out: ZooOutput = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        hidden = cast(Tensor, out.last_hidden_state)
        pooled = pool(hidden, make_context(hidden, None, attention_mask))
        out.logits = cast(Tensor, self.score(pooled))
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=out.logits, config=self.config)
            out.loss = with_auxiliary(loss, out.aux_loss, self.training)
        return out


# An exported copy of this file must not take the library's place.
if __name__ == "seqzoo.zoo.model":
    AutoConfig.register(ZooConfig.model_type, ZooConfig)
    AutoModel.register(ZooConfig, ZooModel)
    AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM)
    AutoModelForSequenceClassification.register(ZooConfig, ZooForSequenceClassification)
