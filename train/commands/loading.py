"""A trained model and its tokenizer, from a checkpoint or from an exported folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from seqzoo.train.checkpoint import SafeCheckpointIO
from seqzoo.train.classification import Classification
from seqzoo.train.module import LanguageModelling, Training
from seqzoo.train.retrieval import Retrieval
from seqzoo.train.token_classification import TokenClassification
from seqzoo.train.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seqzoo.zoo.model import ZooPreTrainedModel

TASKS: dict[str, type[Training]] = {
    cls.__name__: cls for cls in (LanguageModelling, Classification, TokenClassification, Retrieval)
}


class Stored(NamedTuple):
    """What a checkpoint says of its model.

    Attributes:
        task: name of the module's class.
        settings: arguments of its constructor.
        tokenizer: folder or Hub id; None is bytes.
        weights: the module's state dict.
    """

    task: str
    settings: dict[str, Any]
    tokenizer: str | None
    weights: dict[str, Tensor]


def read_checkpoint(path: str | Path) -> Stored:
    """What is needed to build the model again.

    Raises:
        ValueError: a file that is missing, damaged, or was not written by `seqzoo fit`.
    """
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    about = checkpoint.get("seqzoo")
    if about is None:
        raise ValueError(f"{path} was not written by seqzoo: it does not say what it holds")
    return Stored(
        about["task"],
        checkpoint["hyper_parameters"],
        about["tokenizer"],
        checkpoint["state_dict"],
    )


def load_module(path: str | Path) -> Training:
    """The Lightning module of a checkpoint, with its weights, ready to evaluate."""
    stored = read_checkpoint(path)
    module = TASKS[stored.task](**stored.settings)
    module.configure_model()
    module.load_state_dict(stored.weights)
    module.train(False)
    return module


def load_model(path: str | Path) -> tuple["ZooPreTrainedModel", "PreTrainedTokenizerBase"]:
    """The Hugging Face model and its tokenizer, from a checkpoint or from an exported folder.

    Raises:
        ValueError: nothing there that could be loaded.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if path.is_dir():
        from seqzoo.zoo.model import ZooForCausalLM

        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no exported model: it has no config.json")
        # from_pretrained leaves the model in evaluation mode.
        return ZooForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    stored = read_checkpoint(path)
    if stored.task == TokenClassification.__name__:
        raise ValueError(f"{path} answers a synthetic task: it has no text and no tokenizer")
    tokenizer = stored.tokenizer
    loaded = byte_tokenizer() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    return load_module(path).network, loaded
