"""The catalogue: one line a mixer, `name -> "module:Class"`, imported on use.

A name with a colon is itself a path, so anybody's mixer works from YAML: `my_pkg.mod:MyMixer`.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from seqzoo.kernels.errors import unknown
from seqzoo.layers.base import Caps, Mixer

CATALOGUE: dict[str, str] = {
    # attention
    "attention": "seqzoo.layers.attention:Attention",
    # state-space models and recurrences
    "dss": "seqzoo.layers.dss:DSS",
    "h3": "seqzoo.layers.h3:H3",
    "hgrn": "seqzoo.layers.hgrn:HGRN",
    "lru": "seqzoo.layers.lru:LRU",
    "mamba": "seqzoo.layers.mamba:Mamba",
    "mamba2": "seqzoo.layers.mamba2:Mamba2",
    "mamba3": "seqzoo.layers.mamba3:Mamba3",
    "mega": "seqzoo.layers.mega:Mega",
    "mingru": "seqzoo.layers.mingru:MinGRU",
    "rg_lru": "seqzoo.layers.rg_lru:RGLRU",
    "rwkv4": "seqzoo.layers.rwkv4:RWKV4",
    "rwkv5": "seqzoo.layers.rwkv5:RWKV5",
    "rwkv6": "seqzoo.layers.rwkv6:RWKV6",
    "rwkv7": "seqzoo.layers.rwkv7:RWKV7",
    "s4": "seqzoo.layers.s4:S4",
    "s4d": "seqzoo.layers.s4d:S4D",
    "s5": "seqzoo.layers.s5:S5",
    "slstm": "seqzoo.layers.slstm:SLSTM",
    # linear attention
    "aft_full": "seqzoo.layers.aft:AFTFull",
    "aft_simple": "seqzoo.layers.aft:AFTSimple",
    "based": "seqzoo.layers.based:Based",
    "cosformer": "seqzoo.layers.cosformer:CosFormer",
    "deltanet": "seqzoo.layers.deltanet:DeltaNet",
    "gated_deltanet": "seqzoo.layers.gated_deltanet:GatedDeltaNet",
    "gated_deltaproduct": "seqzoo.layers.gated_deltaproduct:GatedDeltaProduct",
    "gla": "seqzoo.layers.gla:GLA",
    "hgrn2": "seqzoo.layers.hgrn2:HGRN2",
    "kda": "seqzoo.layers.kda:KDA",
    "lightning_attention": "seqzoo.layers.lightning_attention:LightningAttention",
    "linear_transformer": "seqzoo.layers.linear_transformer:LinearTransformer",
    "mlstm": "seqzoo.layers.mlstm:MLSTM",
    "mlstm_large": "seqzoo.layers.mlstm_large:MLSTMLarge",
    "performer": "seqzoo.layers.performer:Performer",
    "rebased": "seqzoo.layers.rebased:ReBased",
    "retnet": "seqzoo.layers.retnet:RetNet",
    "ttt_linear": "seqzoo.layers.ttt_linear:TTTLinear",
    # convolutions
    "hyena": "seqzoo.layers.hyena:Hyena",
    "short_conv": "seqzoo.layers.short_conv:ShortConv",
    # channel mixers
    "mlp": "seqzoo.layers.mlp:MLP",
    "rwkv6_channel": "seqzoo.layers.rwkv_channel:RWKV6Channel",
    "rwkv7_channel": "seqzoo.layers.rwkv_channel:RWKV7Channel",
    "rwkv_channel": "seqzoo.layers.rwkv_channel:RWKVChannel",
    "swiglu": "seqzoo.layers.mlp:SwiGLU",
    "switch": "seqzoo.layers.switch:Switch",
}


@dataclass(frozen=True)
class MixerInfo:
    """What is known of a mixer without building it."""

    name: str
    caps: Caps
    kind: str
    paper: str
    kernel: str
    options: dict[str, Any]
    summary: str


def mixer_class(name: str) -> type[Mixer]:
    """The class behind a catalogue name or a `module:Class` path.

    Raises:
        ValueError: no such name, module or class; the message lists what there is.
    """
    path = name if ":" in name else CATALOGUE.get(name)
    if path is None:
        raise unknown("mixer", name, CATALOGUE)
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"mixer {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise ValueError(f"mixer {name!r} is not a Mixer class; see seqzoo.layers.base")
    return found


def mixer_info(name: str) -> MixerInfo:
    """Name, capabilities, paper, kernel, options with their defaults, and a line of summary."""
    cls = mixer_class(name)
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    return MixerInfo(name, cls.caps, cls.kind, cls.paper, cls.kernel, _options(cls), summary)


def list_mixers(
    causal: bool | None = None, state: str | None = None, kind: str | None = None
) -> list[str]:
    """Sorted names of the catalogue.

    Args:
        causal: True keeps those a decoder can use, False those that can run bidirectionally
            themselves.
        state: `constant`, `window`, `growing` or `none`.
        kind: `sequence` or `channel`.

    Raises:
        ValueError: no such state or kind.
    """
    if state is not None and state not in (states := ("constant", "window", "growing", "none")):
        raise unknown("state", state, states)
    if kind is not None and kind not in (kinds := ("sequence", "channel")):
        raise unknown("kind", kind, kinds)
    infos = [mixer_info(name) for name in sorted(CATALOGUE)]
    return [i.name for i in infos if _matches(i, causal, state, kind)]


def create_mixer(name: str, d_model: int, **options: Any) -> Mixer:  # noqa: ANN401
    """Build a mixer by name: `create_mixer("mamba2", d_model=256, d_state=64)`.

    Raises:
        ValueError: an unknown name or option, or a value that the mixer refuses.
    """
    cls = mixer_class(name)
    allowed = _options(cls)
    for option in options:
        if option not in allowed:
            raise unknown(f"option of mixer {name!r} named", option, allowed)
    return cls(d_model, **options)


def _options(cls: type[Mixer]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _matches(info: MixerInfo, causal: bool | None, state: str | None, kind: str | None) -> bool:
    fits = info.caps.causality != "none" if causal else info.caps.bidirectional
    return (
        (causal is None or fits)
        and (state is None or info.caps.state == state)
        and (kind is None or info.kind == kind)
    )
