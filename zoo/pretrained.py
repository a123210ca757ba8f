"""Published weights in our template: transformers' Mamba, Falcon-Mamba, Mamba-2, Llama and Mistral.

A recipe describes an architecture as a stack and says under which name each tensor stands here.
What a recipe cannot express is refused by name, never dropped.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from seqzoo.kernels.errors import unknown
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.model import ZooForCausalLM


class Recipe(NamedTuple):
    """How one architecture of transformers becomes a stack of ours.

    Attributes:
        describe: from its configuration to the fields of a `DecoderSpec`.
        wanted: settings of the configuration that the template has only in this one form.
        layer: beginnings of names within a layer: (theirs, entry of the layer, ours); the first
            that fits counts.
        entries: entries of the stack that make a layer.
    """

    describe: Callable[[Any], dict[str, Any]]
    wanted: dict[str, Any]
    layer: tuple[tuple[str, int, str], ...]
    entries: int


OUTSIDE = {
    "backbone.embeddings.": "model.embed_tokens.",
    "backbone.norm_f.": "model.norm.",
    "model.embed_tokens.": "model.embed_tokens.",
    "model.norm.": "model.norm.",
    "lm_head.": "lm_head.",
}


def import_pretrained(source: str | Path | PreTrainedModel) -> ZooForCausalLM:
    """A published language model as a `ZooForCausalLM` with the same weights and logits.

    Args:
        source: a model of transformers, or the folder or Hub id of one. No code of theirs is run.

    Returns:
        The model in evaluation mode, in the dtype of the source.

    Raises:
        ValueError: an architecture without a recipe, a setting that the template does not have, or
            weights that do not fit.
    """
    if isinstance(source, PreTrainedModel):
        theirs = source
    else:
        theirs = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    config: Any = theirs.config
    if config.model_type not in RECIPES:
        raise unknown("recipe for models of type", config.model_type, RECIPES)
    recipe = RECIPES[config.model_type]
    for name, value in recipe.wanted.items():
        found = getattr(config, name, value)
        if found != value:
            raise ValueError(f"{name}={found!r} has no counterpart here; only {value!r} has")
    decoder = {
        "d_model": config.hidden_size,
        "repeats": config.num_hidden_layers,
        "tie_embeddings": config.tie_word_embeddings,
        **recipe.describe(config),
    }
    special = {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ours = ZooForCausalLM(ZooConfig(decoder=decoder, vocab_size=config.vocab_size, **special))
    ours.to(theirs.dtype)  # type: ignore[arg-type]  # transformers' wrapper has no types
    ours.eval()  # type: ignore[no-untyped-call]
    weights = {_rename(name, recipe): x for name, x in theirs.state_dict().items()}
    _load(ours, weights)
    return ours


def _rename(name: str, recipe: Recipe) -> str:
    inside = re.fullmatch(r"(?:backbone|model)\.layers\.(\d+)\.(.+)", name)
    if inside:
        for theirs, entry, ours in recipe.layer:
            if inside[2].startswith(theirs):
                index = int(inside[1]) * recipe.entries + entry
                return f"model.entries.{index}.{ours}{inside[2].removeprefix(theirs)}"
    for theirs, ours in OUTSIDE.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ValueError(f"weight {name} has no counterpart here")


def _load(model: ZooForCausalLM, weights: dict[str, Tensor]) -> None:
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    for name, x in weights.items():
        if x.ndim == 3:  # a depthwise convolution, (D, 1, W)
            weights[name] = x.squeeze(1)
        if weights[name].shape != shapes.get(name):
            here = tuple(shapes.get(name, ()))
            raise ValueError(f"weight {name} is {tuple(x.shape)}; here it is {here or 'not there'}")
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise ValueError(f"the source has no weights for {', '.join(missing)}")
    model.load_state_dict(weights)


def _mamba(config: Any) -> dict[str, Any]:  # noqa: ANN401
    options = {
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.expand,
        "dt_rank": config.time_step_rank,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
        "norms": config.model_type == "falcon_mamba",
    }
    return {
        "pattern": ["mamba"],
        "options": {"mamba": options},
        "norm_eps": config.layer_norm_epsilon,
    }


def _mamba2(config: Any) -> dict[str, Any]:  # noqa: ANN401
    low, high = config.time_step_limit
    if config.num_heads * config.head_dim != config.expand * config.hidden_size:
        raise ValueError(
            f"num_heads={config.num_heads} of head_dim={config.head_dim} are not"
            f" expand * hidden_size = {config.expand * config.hidden_size} channels"
        )
    options = {
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.expand,
        "head_dim": config.head_dim,
        "n_groups": config.n_groups,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
        **({} if (low, high) == (0, float("inf")) else {"dt_limit": [low, high]}),
    }
    return {
        "pattern": ["mamba2"],
        "options": {"mamba2": options},
        "norm_eps": config.layer_norm_epsilon,
    }


def _llama(config: Any) -> dict[str, Any]:  # noqa: ANN401
    rope = dict(config.rope_parameters)
    if rope.pop("rope_type", "default") != "default" or set(rope) != {"rope_theta"}:
        raise ValueError(f"rope_parameters={config.rope_parameters} has no counterpart here")
    attention = {
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "window": getattr(config, "sliding_window", None),
        "position": {"name": "rope", "base": rope["rope_theta"]},
    }
    return {
        "pattern": ["attention", "swiglu"],
        "options": {"attention": attention, "swiglu": {"hidden": config.intermediate_size}},
        "norm_eps": config.rms_norm_eps,
    }


MAMBA = Recipe(
    _mamba,
    {"hidden_act": "silu", "mixer_rms_eps": 1e-6},
    (
        ("mixer.conv1d.", 0, "mixer.conv_"),
        ("mixer.dt_proj.bias", 0, "mixer.dt_bias"),
        ("mixer.norm.", 0, "mixer.norm_"),
        ("mixer.", 0, "mixer."),
        ("norm.", 0, "norm."),
    ),
    1,
)
LLAMA = Recipe(
    _llama,
    {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    (
        ("self_attn.", 0, "mixer."),
        ("input_layernorm.", 0, "norm."),
        ("mlp.", 1, "mixer."),
        ("post_attention_layernorm.", 1, "norm."),
    ),
    2,
)
RECIPES: dict[str, Recipe] = {
    "falcon_mamba": MAMBA,
    "llama": LLAMA,
    "mamba": MAMBA,
    "mamba2": MAMBA._replace(describe=_mamba2),
    "mistral": LLAMA,
}
