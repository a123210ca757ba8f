"""The configuration that travels with the weights: the decoder's description in one plain dict."""

from typing import Any

from transformers import PreTrainedConfig

from seqzoo.zoo.spec import DecoderSpec as DecoderSpec
from seqzoo.zoo.spec import plain, stack_of


class ZooConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A `DecoderSpec` as plain data, the vocabulary, and what transformers wants to know.

    The description is completed and its names are checked here; whether its mixers can be built,
    and whether they can be found at all, is checked with `spec`, as a model does when it is made.

    Attributes:
        decoder: the fields of `DecoderSpec`; the keys of `swap` are strings, as JSON has them.
        vocab_size: rows of the token embedding.
        initializer_range: standard deviation of the token embedding and of an untied head.
        use_cache: return a cache by default, outside of training.
        tie_word_embeddings: `tie_embeddings` of the decoder when None.

    Raises:
        ValueError: a field that a decoder does not have, or one that is no plain data.
    """

    model_type = "seqzoo"
    keys_to_ignore_at_inference = ("past_key_values",)

    decoder: dict[str, Any] | None = None
    vocab_size: int = 259
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401  # whatever a config.json holds
        self.decoder = plain(self.decoder or {})
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.decoder["tie_embeddings"]
        self.decoder["tie_embeddings"] = self.tie_word_embeddings
        if self.decoder["max_length"] is not None:  # else unlimited: no such attribute at all
            kwargs.setdefault("max_position_embeddings", self.decoder["max_length"])
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "ZooConfig":
        """Itself: `decoder` here is a description, not a configuration of its own."""
        return self

    @property
    def spec(self) -> DecoderSpec:
        """The description, validated."""
        return DecoderSpec.from_dict(self.decoder or {})

    @property
    def hidden_size(self) -> int:
        """Width D, under the name that other libraries look for."""
        return int((self.decoder or {})["d_model"])

    @property
    def num_hidden_layers(self) -> int:
        """Entries of the stack."""
        decoder = self.decoder or {}
        return len(stack_of(decoder["pattern"], decoder["mixer"])) * int(decoder["repeats"])
