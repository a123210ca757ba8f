"""The byte tokenizer: a plain `tokenizer.json` that any tool of the Hub reads.

id = byte + 3; 0 pads, 1 begins, 2 ends a document; 259 ids. As a BPE over the 256 byte symbols
without merges it needs no code of ours to load, and every text comes back as it went in.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
FIRST = 3  # id of byte 0
VOCAB_SIZE = FIRST + 256


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """The byte tokenizer as transformers has it; pads on the left, adds no special tokens.

    A text that spells `<eos>` is five bytes, not an end: nothing a user types becomes a special
    token, so encoding and decoding any string is exact.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    vocab |= {symbol: byte + FIRST for byte, symbol in enumerate(_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


class Encoder:
    """Documents to ids, with bytes or with any tokenizer of the Hub.

    Args:
        name: a folder or Hub id for AutoTokenizer; bytes when None.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, as transformers has it.

        Raises:
            ValueError: there is none under this name.
        """
        if self.name is None:
            return byte_tokenizer()
        from transformers import AutoTokenizer

        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=False
            )
        except OSError as error:
            raise ValueError(f"no tokenizer {self.name!r}: {_first_line(error)}") from error
        return found

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return VOCAB_SIZE if self.name is None else len(self.tokenizer)

    @property
    def eos(self) -> int:
        """The id that ends a document."""
        return EOS if self.name is None else self._special("eos", "sep")

    @property
    def pad(self) -> int:
        """The id that fills rows."""
        return PAD if self.name is None else self._special("pad", "eos")

    def __call__(self, data: bytes) -> Tensor:
        """Ids of a document, without special tokens: (N,)."""
        if self.name is None:
            return encode_bytes(data)
        text = data.decode("utf-8", errors="replace")
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int32)

    def _special(self, *names: str) -> int:
        for name in names:
            found = getattr(self.tokenizer, f"{name}_token_id")
            if found is not None:
                return int(found)
        raise ValueError(f"tokenizer {self.name!r} has no {' or '.join(names)} token")


def encode_bytes(data: bytes) -> Tensor:
    """Ids of any bytes, UTF-8 or not: (len(data),) int16."""
    if not data:
        return torch.zeros(0, dtype=torch.int16)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int16) + FIRST


def decode_bytes(ids: Tensor) -> bytes:
    """The bytes of (T,) ids; pad, bos and eos are left out.

    Raises:
        ValueError: an id that is no byte's.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < VOCAB_SIZE:
        raise ValueError(f"ids go from {int(ids.min())} to {int(ids.max())}; bytes have 0 to 258")
    return bytes((ids[ids >= FIRST] - FIRST).tolist())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _symbols() -> list[str]:
    """The printable letter that stands for each byte in a byte-level `tokenizer.json`.

    Printable Latin-1 stands for itself; the other 68 bytes take the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
