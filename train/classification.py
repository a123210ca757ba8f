"""Tell the class of a sequence, as a Lightning module.

Logged beside what `Training` logs: `val/accuracy`, and the floors that the data know of, as
`val/floor_majority`; on generated data every name of these ends in `-gen`.
"""

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from seqzoo.train.lra.models import ZooForPixels
from seqzoo.train.module import Batch, Training
from seqzoo.train.pretrain import SelfPretraining, check_pretraining
from seqzoo.zoo.config import DecoderSpec
from seqzoo.zoo.model import ZooForSequenceClassification, ZooPreTrainedModel


class Classification(Training):
    """Tell the class of a sequence.

    Args:
        decoder: the residual stack; `causal: false` lets every token see the whole sequence.
        n_classes: number of classes; the command line takes it from the data.
        real_valued: read `pixel_values` instead of tokens; the command line takes it from the data.
        self_pretrain: `masked` or `causal`: spend the first `pretrain_steps` of the run's steps on
            telling the inputs' own tokens, then go on with the task from those weights, with a new
            optimizer and the schedule from its beginning. `causal` needs a causal decoder.
        pretrain_steps: steps of that; the others, up to `--trainer.max_steps`, are the task's.
        pretrain_rate: share of the tokens that `masked` hides; the data's own, or 0.15, when None.
        settings: those of `Training`.
    """

    towers = 1  # documents of a sample

    def __init__(
        self,
        decoder: DecoderSpec,
        *,
        n_classes: int = 2,
        real_valued: bool = False,
        self_pretrain: str | None = None,
        pretrain_steps: int = 1000,
        pretrain_rate: float | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(decoder, **settings)
        if n_classes < 1:
            raise ValueError(
                f"n_classes={n_classes} is not allowed: a classifier needs data with classes, as "
                "Labelled has them"
            )
        check_pretraining(self.decoder, self_pretrain, pretrain_steps, pretrain_rate)
        more = {"self_pretrain": self_pretrain, "pretrain_steps": pretrain_steps}
        more |= {"n_classes": n_classes, "real_valued": bool(real_valued)}
        self.save_hyperparameters({**more, "pretrain_rate": pretrain_rate})
        self.pretraining: SelfPretraining | None = None

    @property
    def first_steps(self) -> int:
        """Steps of self-pretraining."""
        return int(self.hparams["pretrain_steps"]) if self.hparams["self_pretrain"] else 0

    def build(self) -> ZooPreTrainedModel:
        """See `Training.build`."""
        kind = ZooForPixels if self.hparams["real_valued"] else ZooForSequenceClassification
        return kind(self.config(num_labels=self.hparams["n_classes"]))

    def configure_model(self) -> None:
        """See `Training.configure_model`."""
        super().configure_model()
        if self.pretraining is None and self.hparams["self_pretrain"]:
            objective, size = self.hparams["self_pretrain"], self.hparams["vocab_size"]
            self.pretraining = SelfPretraining(objective, self.decoder.d_model, size)

    def setup(self, stage: str) -> None:
        """Refuse pairs of documents where one is read, and the other way round."""
        super().setup(stage)
        towers = getattr(self._data, "towers", 1)
        if towers != self.towers:
            model = "Retrieval" if towers == 2 else "Classification"
            raise ValueError(
                f"these data hold {towers} document(s) a sample and {type(self).__name__} reads "
                f"{self.towers}; give --model {model}"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The task begins with an optimizer that knows nothing of what was before."""
        if self.first_steps and self.global_step == self.first_steps:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, Optimizer)
            optimizer.state.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the phase the run is in."""
        if self.global_step >= self.first_steps:
            return super().training_step(batch, batch_idx)
        network = self.network
        assert self.pretraining is not None
        given = self.hparams["pretrain_rate"]
        rate = getattr(self._data, "mask_rate", 0.15) if given is None else given
        out = self.pretraining(network, batch, rate)
        self.log("train/pretrain_loss", out.loss, prog_bar=True, logger=False)
        if self.global_step % getattr(self.trainer, "log_every_n_steps", 1) == 0:
            # Through Lightning's own log it would be repeated to the end of the epoch.
            for logger in self.loggers:
                logger.log_metrics({"train/pretrain_loss": out.loss.item()}, self.global_step)
        self._clock.tokens += batch["input_ids"].numel()
        loss: Tensor = out.loss
        return loss

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Loss and share of right answers."""
        logits, labels = self._logits(batch), batch["labels"]
        figures = {
            f"{stage}/loss": cross_entropy(logits, labels),
            f"{stage}/accuracy": (logits.argmax(-1) == labels).float().mean(),
        }
        shown = {f"{name}{self._suffix}": value for name, value in figures.items()}
        self.log_dict(shown, batch_size=len(labels), prog_bar=True, sync_dist=True)
        if self._suffix and self.trainer.state.fn == TrainerFn.FITTING:
            # What checkpoints are chosen by has one name whatever the data; nobody is shown it.
            self.log_dict(figures, batch_size=len(labels), logger=False, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """The floors beside the accuracy."""
        self._log_floors("val")

    def on_test_epoch_end(self) -> None:
        """The floors beside the accuracy."""
        self._log_floors("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Class and probabilities of every row."""
        chances = self._logits(batch).softmax(-1).tolist()
        return [{"class": row.index(max(row)), "probabilities": row} for row in chances]

    @property
    def _data(self) -> Any:  # noqa: ANN401  # any data module
        return getattr(self.trainer, "datamodule", None)

    @property
    def _suffix(self) -> str:
        return str(getattr(self._data, "suffix", ""))

    def _log_floors(self, stage: str) -> None:
        known = getattr(self._data, "floors", {}).get(stage, {})
        named = {f"{stage}/floor_{name}{self._suffix}": value for name, value in known.items()}
        self.log_dict(named)

    def _logits(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.network(**inputs).logits.float()
        return logits
