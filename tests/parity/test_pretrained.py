"""Whole models of transformers in our template: the same weights give the same logits, to 1e-4."""

import copy
import sys

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
)

import seqzoo
from seqzoo.train.cli import main
from tests.tolerances import relative_error

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {**SIZES, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SSM = {**SIZES, "state_size": 8, **SPECIAL}
CONFIGS = {
    "falcon_mamba": FalconMambaConfig(**SSM),
    "llama": LlamaConfig(**HEADS, rms_norm_eps=1e-3, rope_parameters={"rope_theta": 500.0}),
    "mamba": MambaConfig(**SSM, use_bias=True, layer_norm_epsilon=1e-3),
    "mamba2": Mamba2Config(**SSM, num_heads=8, head_dim=8, n_groups=2, chunk_size=16),
    "mistral": MistralConfig(**HEADS, sliding_window=9, tie_word_embeddings=True),
}


@pytest.fixture
def theirs(monkeypatch):
    """Builds a model of transformers on its torch path, with weights that make states matter."""
    for package in ("mamba_ssm", "causal_conv1d", "fla", "kernels"):
        monkeypatch.setitem(sys.modules, package, None)

    def build(name: str):
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(CONFIGS[name])
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        return model

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_give_the_same_logits(name, theirs):
    model = theirs(name)
    ours = seqzoo.import_pretrained(model)
    ids = torch.randint(3, 50, (2, 40))
    with torch.no_grad():
        wanted = model(ids).logits
        assert relative_error(ours(ids).logits, wanted) <= 1e-4
        first = ours(ids[:, :30], use_cache=True)
        rest = ours(ids[:, 30:], past_key_values=first.past_key_values)
        assert relative_error(rest.logits, wanted[:, 30:]) <= 1e-4


def test_a_folder_is_imported_and_exported_by_the_command_line(theirs, tmp_path, capsys):
    model = theirs("llama")
    model.save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    loaded = seqzoo.ZooForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(3, 50, (1, 20))
    assert relative_error(loaded(ids).logits, model(ids).logits) <= 1e-4


def test_what_has_no_counterpart_is_refused_by_name(theirs):
    from transformers import GPT2LMHeadModel

    with pytest.raises(ValueError, match=r"no recipe for models of type 'gpt2'.*llama"):
        seqzoo.import_pretrained(
            GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, **SPECIAL))
        )
    model = theirs("llama")
    model.config.attention_bias = True
    with pytest.raises(ValueError, match="attention_bias=True has no counterpart"):
        seqzoo.import_pretrained(model)
    model = theirs("llama")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=r"rope_parameters=.* has no counterpart"):
        seqzoo.import_pretrained(model)
