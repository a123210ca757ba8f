"""Named decoders: `tiny` ones train on a CPU in minutes, `small` ones are as large as GPT-2."""

import dataclasses
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from seqzoo.kernels.errors import unknown
from seqzoo.zoo.spec import DecoderSpec

if TYPE_CHECKING:
    from seqzoo.zoo.model import ZooForCausalLM

GEGLU = {"is": "swiglu", "expand": 3, "activation": "gelu"}

# What `DecoderSpec` is given, not specs: making one builds its mixers, and nobody needs them all.
PRESETS: dict[str, dict[str, Any]] = {
    "gla-tiny": {"d_model": 128, "mixer": "gla", "repeats": 4},
    # De et al., 2024, arXiv:2402.19427: two recurrences to each local multi-query attention, and
    # gated MLPs of three times the width; small is the paper's smallest (its table 1).
    "griffin-small": {
        "d_model": 768,
        "pattern": ["rg_lru", "geglu", "rg_lru", "geglu", "local", "geglu"],
        "repeats": 4,
        "options": {
            "rg_lru": {"width": 1024, "n_heads": 16},
            "geglu": GEGLU,
            "local": {"is": "attention", "n_heads": 6, "n_kv_heads": 1, "window": 1024},
        },
        "position": "rope",
    },
    "griffin-tiny": {
        "d_model": 128,
        "pattern": ["rg_lru", "geglu", "rg_lru", "geglu", "local", "geglu"],
        "repeats": 2,
        "options": {
            "geglu": GEGLU,
            "local": {"is": "attention", "n_heads": 4, "n_kv_heads": 1, "window": 128},
        },
        "position": "rope",
    },
    # The same paper's stack without attention.
    "hawk-tiny": {
        "d_model": 128,
        "pattern": ["rg_lru", "geglu"],
        "repeats": 4,
        "options": {"geglu": GEGLU},
    },
    # One attention to three state-space layers, about the share of published hybrids.
    "hybrid-tiny": {
        "d_model": 128,
        "pattern": [
            "mamba2",
            "swiglu",
            "mamba2",
            "swiglu",
            "attention",
            "swiglu",
            "mamba2",
            "swiglu",
        ],
        "position": "rope",
    },
    "hyena-tiny": {"d_model": 128, "mixer": "hyena", "repeats": 4, "max_length": 2048},
    # Complete in themselves: a Mamba stack has no channel mixers (arXiv:2312.00752, section 3.4).
    "mamba-tiny": {"d_model": 128, "pattern": ["mamba"], "repeats": 8},
    "mamba2-tiny": {"d_model": 128, "pattern": ["mamba2"], "repeats": 8},
    # Peng et al., 2023, arXiv:2305.13048: time mix and channel mix, and layer norms.
    "rwkv4-tiny": {
        "d_model": 128,
        "pattern": ["rwkv4", "rwkv_channel"],
        "repeats": 4,
        "norm": "layernorm",
    },
    # Peng et al., 2024, arXiv:2404.05892: Eagle, whose channel mix is version 4's, and Finch.
    "rwkv5-tiny": {
        "d_model": 128,
        "pattern": ["rwkv5", "rwkv_channel"],
        "repeats": 4,
        "options": {"rwkv_channel": {"expand": 3.5}},
        "norm": "layernorm",
    },
    "rwkv6-tiny": {
        "d_model": 128,
        "pattern": ["rwkv6", "rwkv6_channel"],
        "repeats": 4,
        "norm": "layernorm",
    },
    # Peng et al., 2025, arXiv:2503.14456: the first time mix hands its values to the others.
    "rwkv7-tiny": {
        "d_model": 128,
        "pattern": ["rwkv7", "rwkv7_channel"],
        "repeats": 4,
        "norm": "layernorm",
    },
    # Fedus et al., 2021, arXiv:2101.03961: experts in every other channel mixer.
    "switch-tiny": {
        "d_model": 128,
        "pattern": ["attention", "swiglu", "attention", "switch"],
        "repeats": 2,
        "position": "rope",
    },
    "transformer-small": {
        "d_model": 768,
        "mixer": "attention",
        "repeats": 12,
        "options": {"attention": {"n_heads": 12}},
        "position": "rope",
    },
    "transformer-tiny": {"d_model": 128, "mixer": "attention", "repeats": 4, "position": "rope"},
    # Beck et al., 2024, arXiv:2405.04517: xLSTM[1:0] is matrix memories alone, whose blocks are
    # complete; xLSTM[7:1] has one scalar memory in eight, and a narrow gated network behind it.
    "xlstm-1-0-tiny": {
        "d_model": 128,
        "pattern": ["mlstm"],
        "repeats": 8,
        "norm": "layernorm",
    },
    "xlstm-7-1-tiny": {
        "d_model": 128,
        "pattern": ["mlstm", "slstm", "swiglu", *["mlstm"] * 6],
        "options": {"swiglu": {"expand": 4 / 3}},
        "norm": "layernorm",
    },
}


def list_models(wildcard: str = "*") -> list[str]:
    """Sorted names of the presets that match: `list_models("*-tiny")`."""
    return sorted(name for name in PRESETS if fnmatchcase(name, wildcard))


def preset(name: str, **overrides: Any) -> DecoderSpec:  # noqa: ANN401  # fields of DecoderSpec
    """The description behind a name.

    Args:
        name: one of `list_models()`.
        overrides: fields of `DecoderSpec` to replace.

    Raises:
        ValueError: no such preset or field, or a value that `DecoderSpec` refuses.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    fields = [field.name for field in dataclasses.fields(DecoderSpec)]
    for override in overrides:
        if override not in fields:
            raise unknown("decoder option named", override, fields)
    given = dict(PRESETS[name])
    for one, other in (("mixer", "pattern"), ("pattern", "mixer")):  # two ways to say the same
        if overrides.get(one) is not None:
            given.pop(other, None)
    return DecoderSpec(**(given | overrides))


def create_model(name: str, *, vocab_size: int, **overrides: Any) -> "ZooForCausalLM":  # noqa: ANN401
    """A language model with fresh weights: `create_model("hybrid-tiny", vocab_size=259)`.

    Args:
        name: one of `list_models()`.
        vocab_size: rows of the token embedding.
        overrides: fields of `DecoderSpec` to replace, such as `d_model=64`.

    Raises:
        ValueError: see `preset`.
    """
    from seqzoo.zoo.config import ZooConfig
    from seqzoo.zoo.model import ZooForCausalLM

    spec = preset(name, **overrides)
    return ZooForCausalLM(ZooConfig(decoder=spec.to_dict(), vocab_size=vocab_size))
