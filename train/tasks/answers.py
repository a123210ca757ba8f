"""How a model answers: the class for each readout, and its answers against a batch's labels."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from seqzoo.train.tasks.autoencoder import AutoEncoder
from seqzoo.zoo.base import ZooOutput, ZooPreTrainedModel
from seqzoo.zoo.losses import IGNORED
from seqzoo.zoo.model import ZooForCausalLM, ZooForSequenceClassification

PER_TOKEN: dict[str, type[ZooPreTrainedModel]] = {"token": ZooForCausalLM, "last": AutoEncoder}
READOUTS: dict[str, type[ZooPreTrainedModel]] = {
    **PER_TOKEN,
    "pooled": ZooForSequenceClassification,
}


def answers(
    network: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[ZooOutput, Tensor, Tensor, Tensor]:
    """The model's output, the summed loss of what is asked, how much is right, how much is asked.

    A label belongs to its own position, or to its row: nothing is shifted.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    out: ZooOutput = network(**inputs, use_cache=False)
    assert out.logits is not None
    asked = batch["labels"] != IGNORED
    logits, labels = out.logits[asked].float(), batch["labels"][asked]
    total = cross_entropy(logits, labels, reduction="sum")
    return out, total, (logits.argmax(-1) == labels).sum(), asked.sum()
