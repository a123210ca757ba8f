"""The byte tokenizer is exact, and needs no code of ours."""

import pytest
import torch
from transformers import AutoTokenizer

from seqzoo.train.tokenizer import (
    BOS,
    EOS,
    PAD,
    VOCAB_SIZE,
    Encoder,
    byte_tokenizer,
    decode_bytes,
    encode_bytes,
)

TEXTS = [
    "",
    "plain",
    " leading, trailing \n\t\r\n ",
    "na\u00efve \u4f60\u597d \U0001f389\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
    "<eos><pad> <bos>\x00\x7f don't , . clean ' s",
    "".join(chr(i) for i in range(0x300)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_every_text_comes_back_and_ids_are_bytes_plus_three(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == [byte + 3 for byte in text.encode()] == encode_bytes(text.encode()).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, EOS], skip_special_tokens=True) == text


def test_any_bytes_come_back_utf8_or_not():
    data = bytes(range(256)) * 2 + b"\xff\xfe\x80"
    assert decode_bytes(encode_bytes(data)) == data
    ids = torch.tensor([PAD, PAD, BOS, *encode_bytes(data), EOS])
    assert decode_bytes(ids) == data
    for wrong in (VOCAB_SIZE, -1):
        with pytest.raises(ValueError, match="bytes have 0 to 258"):
            decode_bytes(torch.tensor([wrong]))


def test_special_ids_and_left_padding(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE == 259
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch.input_ids == [[0, 0, 100], [100, 101, 102]]
    assert batch.attention_mask == [[0, 0, 1], [1, 1, 1]]


def test_saved_folder_loads_without_seqzoo(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert not type(loaded).__module__.startswith("seqzoo")
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.padding_side == "left"
    assert loaded.eos_token_id == EOS


def test_encoder_reads_a_saved_tokenizer_and_finds_its_special_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    named, plain = Encoder(str(tmp_path)), Encoder()
    data = "caf\u00e9 <eos>".encode()
    assert named(data).tolist() == plain(data).tolist()
    assert (named.eos, named.pad, named.vocab_size) == (plain.eos, plain.pad, plain.vocab_size)
    with pytest.raises(ValueError, match=r"no tokenizer .*nowhere"):
        Encoder(str(tmp_path / "nowhere")).tokenizer  # noqa: B018
