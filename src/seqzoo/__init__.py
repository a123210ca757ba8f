"""seqzoo: every sequence mixer swappable for every other, on CPU and GPU."""

from importlib import import_module
from typing import TYPE_CHECKING

from seqzoo.layers import create_mixer as create_mixer
from seqzoo.layers import list_mixers as list_mixers
from seqzoo.layers import mixer_info as mixer_info

if TYPE_CHECKING:
    from seqzoo.zoo.config import ZooConfig as ZooConfig
    from seqzoo.zoo.export import export as export
    from seqzoo.zoo.model import ZooForCausalLM as ZooForCausalLM
    from seqzoo.zoo.model import ZooForSequenceClassification as ZooForSequenceClassification
    from seqzoo.zoo.model import ZooModel as ZooModel
    from seqzoo.zoo.presets import create_model as create_model
    from seqzoo.zoo.presets import list_models as list_models
    from seqzoo.zoo.pretrained import import_pretrained as import_pretrained
    from seqzoo.zoo.spec import DecoderSpec as DecoderSpec

# Resolved on first use, so that mixers and kernels come without Hugging Face.
LATER = {
    "DecoderSpec": "seqzoo.zoo.spec",
    "ZooConfig": "seqzoo.zoo.config",
    "ZooForCausalLM": "seqzoo.zoo.model",
    "ZooForSequenceClassification": "seqzoo.zoo.model",
    "ZooModel": "seqzoo.zoo.model",
    "create_model": "seqzoo.zoo.presets",
    "export": "seqzoo.zoo.export",
    "import_pretrained": "seqzoo.zoo.pretrained",
    "list_models": "seqzoo.zoo.presets",
}


def __getattr__(name: str) -> object:
    if name not in LATER:
        raise AttributeError(f"module 'seqzoo' has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER})
