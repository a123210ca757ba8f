"""Give the answers that are asked for at some tokens, as a Lightning module."""

from typing import Any

from seqzoo.train.module import Batch, Training
from seqzoo.train.tasks.answers import PER_TOKEN, answers
from seqzoo.zoo.base import ZooOutput
from seqzoo.zoo.config import DecoderSpec
from seqzoo.zoo.losses import IGNORED, with_auxiliary
from seqzoo.zoo.model import ZooPreTrainedModel


class TokenClassification(Training):
    """Give the answers that are asked for at some tokens, as the synthetic tasks do.

    A label belongs to its own position, unlike a language model's; -100 asks for nothing.

    Args:
        decoder: the residual stack.
        readout: `token` reads each answer at its own position; `last` decodes all of them from the
            last one (an autoencoder). The command line takes it from the data.
        settings: those of `Training`.
    """

    by_token = True

    def __init__(
        self,
        decoder: DecoderSpec,
        *,
        readout: str = "token",
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(decoder, **settings)
        if readout not in PER_TOKEN:
            raise ValueError(
                f"readout={readout!r} is not allowed; it must be {' or '.join(PER_TOKEN)}, which "
                "data with an answer at each token say, as Synthetic does"
            )
        self.save_hyperparameters({"readout": readout})

    def build(self) -> ZooPreTrainedModel:
        """See `Training.build`."""
        return PER_TOKEN[self.hparams["readout"]](self.config())

    def output(self, batch: Batch) -> ZooOutput:
        """See `Training.output`."""
        out, total, _, asked = answers(self.network, batch)
        out.loss = with_auxiliary(total / asked.clamp(min=1), out.aux_loss, self.training)
        return out

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See `evaluate`."""
        self.evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See `evaluate`."""
        self.evaluate(batch, "test", dataloader_idx)

    def evaluate(self, batch: Batch, stage: str, number: int = 0) -> None:
        """Loss and share of right answers; `val/accuracy_at_256` at another length."""
        _, total, right, asked = answers(self.network, batch)
        suffix = f"_at_{batch['input_ids'].shape[1]}" if number else ""
        count = int(asked)
        figures = {"loss": total / max(count, 1), "accuracy": right / max(count, 1)}
        self.log_dict(
            {f"{stage}/{name}{suffix}": value for name, value in figures.items()},
            batch_size=count,
            prog_bar=True,
            sync_dist=True,
            add_dataloader_idx=False,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers of every row by position, and whether they are right."""
        said = self.network(input_ids=batch["input_ids"], use_cache=False).logits.argmax(-1)
        rows = []
        for ids, labels in zip(said, batch["labels"], strict=True):
            asked = (labels != IGNORED).nonzero()[:, 0]
            right = (ids == labels)[asked]
            answer = dict(zip(map(str, asked.tolist()), ids[asked].tolist(), strict=True))
            rows.append({"answers": answer, "right": int(right.sum()), "asked": len(asked)})
        return rows
