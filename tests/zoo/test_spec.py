"""The description of a decoder: what it means, and what it refuses."""

import dataclasses
import json

import pytest
import torch

from seqzoo.layers.base import Bidirectional
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.spec import DecoderSpec, stack_of


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("rg_lru*3, attention", ["rg_lru"] * 3 + ["attention"]),
        (["rg_lru * 2", "swiglu"], ["rg_lru", "rg_lru", "swiglu"]),
        ("a.b:C*2", ["a.b:C", "a.b:C"]),
    ],
)
def test_counts_in_patterns_are_written_out(pattern: str | list[str], names: list[str]):
    assert stack_of(pattern) == names


def test_short_form_pairs_the_mixer_with_a_channel_mixer():
    assert DecoderSpec(d_model=16, mixer="rg_lru", repeats=2).names() == ["rg_lru", "swiglu"] * 2
    assert DecoderSpec(d_model=16).names() == ["attention", "swiglu"]


def test_one_mixer_stands_twice_with_other_options():
    spec = DecoderSpec(
        d_model=16,
        pattern=["local", "attention"],
        options={"local": {"is": "attention", "window": 4}, "attention": {"n_heads": 2}},
        position="rope",
    )
    local, full = spec.resolve()
    assert (local.name, local.mixer) == ("local", "attention")
    assert local.options == {"window": 4, "position": "rope"}  # nothing of `attention`'s own
    assert full.options == {"n_heads": 2, "position": "rope"}


def test_an_embedded_position_reaches_no_mixer():
    spec = DecoderSpec(d_model=16, mixer="attention", position="sinusoidal")
    assert spec.resolve()[0].options == {}
    assert spec.build_position() is not None


def test_max_length_is_the_default_of_mixers_that_have_it():
    spec = DecoderSpec(d_model=16, pattern=["hyena", "rg_lru"], max_length=32)
    assert [entry.options for entry in spec.resolve()] == [{"max_length": 32}, {}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pattern": ["attenton"]}, r"no mixer 'attenton'; nearest: attention"),
        ({"pattern": []}, r"needs at least one name"),
        ({"pattern": ["rg_lru*0"]}, r"write `name` or `name\*3`"),
        ({"pattern": ["rg_lru"], "mixer": "rg_lru"}, r"give one of them"),
        ({"mixer": "attention", "options": {"attention": {"n_head": 2}}}, r"nearest: n_heads"),
        ({"mixer": "attention", "options": {"atention": {}}}, r"no mixer 'atention'"),
        (
            {"mixer": "attention", "options": {"attention": {"n_heads": 3}}},
            r"entry 'attention': d_model=16 is not divisible by n_heads=3; nearest: 15, 18",
        ),
        ({"mixer": "attention", "position": "ropes"}, r"no position 'ropes'; nearest: rope"),
        ({"mixer": "attention", "position": {"base": 1.0}}, r"has no name"),
        ({"norm": "batchnorm"}, r"no norm 'batchnorm'"),
        ({"swap": {2: "rg_lru"}}, r"swap of entry 2 .* entries 0 to 1"),
        ({"swap": {0: "rglru"}}, r"no mixer 'rglru'; nearest: rg_lru"),
        ({"d_model": 0}, r"d_model=0 is not allowed"),
        ({"repeats": 0}, r"repeats=0 is not allowed"),
        ({"dropout": 1.0}, r"dropout=1.0 is not allowed"),
        ({"max_length": -1}, r"max_length=-1 is not allowed"),
        ({"pattern": ["zoo_test_user.mixers:Backward"]}, r"`causal: false` .*listops"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        DecoderSpec(**{"d_model": 16, **wrong})
    assert "\n" not in str(caught.value)


def test_validation_leaves_the_random_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DecoderSpec(d_model=16, pattern=["rg_lru", "attention"])
    assert torch.get_rng_state().equal(before)


def test_a_bidirectional_stack_doubles_strict_mixers_only():
    spec = DecoderSpec(
        d_model=16,
        pattern=["attention", "rg_lru", "swiglu", "zoo_test_user.mixers:Backward"],
        causal=False,
    )
    built = [spec.build(entry) for entry in spec.resolve()]
    assert [isinstance(mixer, Bidirectional) for mixer in built] == [False, True, False, False]
    assert built[0].causal is False


def test_swapped_replaces_entries_and_keeps_earlier_swaps():
    spec = DecoderSpec(d_model=16, mixer="attention", repeats=2).swapped({2: "rg_lru"})
    assert spec.swapped({0: "mamba"}).names() == ["mamba", "swiglu", "rg_lru", "swiglu"]


def test_json_gives_the_description_back_exactly():
    spec = DecoderSpec(
        d_model=16,
        pattern=["local", "swiglu"],
        repeats=6,
        options={"local": {"is": "attention", "window": 4}},
        position={"name": "rope", "base": 500.0},
        swap={10: "rg_lru"},
    )
    assert DecoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert DecoderSpec(**dataclasses.asdict(spec)) == spec


def test_config_survives_its_file_with_swaps_and_changes(tmp_path):
    spec = DecoderSpec(d_model=16, mixer="attention", swap={1: "mlp"}, max_length=64)
    config = ZooConfig(decoder=spec.to_dict(), vocab_size=7, eos_token_id=3)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    again = ZooConfig.from_pretrained(tmp_path)
    assert again.spec == dataclasses.replace(spec, tie_embeddings=False)
    assert (again.vocab_size, again.eos_token_id, again.tie_word_embeddings) == (7, 3, False)
    assert again.max_position_embeddings == 64
    assert (again.hidden_size, again.num_hidden_layers) == (16, 2)
    again.save_pretrained(tmp_path / "twice")
    assert ZooConfig.from_pretrained(tmp_path / "twice").to_dict() == again.to_dict()


def test_config_without_a_length_claims_none():
    assert not hasattr(ZooConfig(), "max_position_embeddings")


def test_config_refuses_a_field_that_no_decoder_has():
    with pytest.raises(ValueError, match="'d_modl'; nearest: d_model"):
        ZooConfig(decoder={"d_modl": 16})
