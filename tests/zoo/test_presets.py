"""Presets are built, and the public names come without Hugging Face until they are used."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqzoo
from seqzoo.zoo.presets import PRESETS, create_model, list_models, preset

TINY = list_models("*-tiny")


def test_wildcards_choose_presets():
    assert list_models() == sorted(PRESETS)
    assert list_models("transformer-*") == ["transformer-small", "transformer-tiny"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", TINY)
def test_every_preset_makes_a_model_that_predicts(name: str):
    model = create_model(name, vocab_size=11, d_model=32, repeats=1)
    logits = model(torch.zeros(1, 3, dtype=torch.long)).logits
    assert logits.shape == (1, 3, 11)
    assert logits.isfinite().all()


def test_griffin_has_two_recurrences_to_each_local_multi_query_attention():
    entries = preset("griffin-tiny").resolve()
    mixers = [e.mixer for e in entries if e.name != "geglu"]
    assert mixers == ["rg_lru", "rg_lru", "attention"] * 2
    assert entries[4].options["n_kv_heads"] == 1
    assert entries[4].options["window"] > 0


def test_xlstm_has_as_many_matrix_memories_to_each_scalar_one_as_its_name_says():
    for name, matrices, scalars in (("xlstm-7-1-tiny", 7, 1), ("xlstm-1-0-tiny", 8, 0)):
        mixers = [e.mixer for e in preset(name).resolve()]
        assert (mixers.count("mlstm"), mixers.count("slstm")) == (matrices, scalars)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("transformer-small", 100e6, 200e6), ("griffin-small", 80e6, 120e6)],
)
def test_a_small_model_is_of_its_published_size(name: str, least: float, most: float):
    with torch.device("meta"):
        model = create_model(name, vocab_size=50257)
    own = sum(p.numel() for p in model.parameters())
    if name == "griffin-small":  # whose table counts no embedding
        own -= model.get_input_embeddings().weight.numel()
    assert least < own < most


def test_an_override_replaces_the_other_way_to_say_the_same():
    assert preset("transformer-tiny", pattern=["rg_lru"], repeats=1).names() == ["rg_lru"]
    assert preset("mamba-tiny", mixer="rg_lru", repeats=1).names() == ["rg_lru", "swiglu"]


def test_unknown_presets_and_overrides_name_the_nearest():
    with pytest.raises(ValueError, match="no preset 'mamba3-tiny'; nearest: mamba"):
        create_model("mamba3-tiny", vocab_size=7)
    with pytest.raises(ValueError, match="'d_modl'; nearest: d_model"):
        create_model("mamba-tiny", vocab_size=7, d_modl=3)


def test_public_names_are_found_listed_and_refused_by_name():
    for name in seqzoo.LATER:
        assert name in dir(seqzoo)
        assert getattr(seqzoo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        seqzoo.nothing  # noqa: B018


def test_listing_models_needs_no_transformers():
    code = "import sys, seqzoo; seqzoo.list_models(); sys.exit('transformers' in sys.modules)"
    path = str(Path(__file__).parents[2] / "src")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})
