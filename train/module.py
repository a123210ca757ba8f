"""What is trained: a language model or a classifier, as Lightning modules around the zoo's classes.

Logged: `train/loss`, `train/tokens_per_second`, `train/aux_loss` where mixers add one, and their
statistics by entry; `val/loss`, and `val/accuracy` or `val/bits_per_byte` (`val/bits_per_token`
with a tokenizer other than bytes). Beside an accuracy stand the floors that the data know of, as
`val/floor_majority`; on generated data every name of these ends in `-gen`.
"""

import math
import time
from abc import abstractmethod
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from seqzoo.kernels.errors import check_positive
from seqzoo.train.lra.models import ZooForPixels
from seqzoo.train.optim import (
    build_optimizer,
    build_schedule,
    override,
    parameter_groups,
    warmup_cosine,
    warmup_linear,
)
from seqzoo.train.pretrain import SelfPretraining, check_pretraining
from seqzoo.train.tokenizer import BOS, EOS, PAD, VOCAB_SIZE
from seqzoo.zoo.config import DecoderSpec, ZooConfig
from seqzoo.zoo.model import ZooForCausalLM, ZooForSequenceClassification, ZooPreTrainedModel

Batch = dict[str, Tensor]
LINKED = ("vocab_size", "n_classes", "real_valued")  # what the data tell the model


class Training(LightningModule):
    """What both tasks share: building the model, the optimiser, the figures logged.

    Args:
        decoder: the residual stack; see `seqzoo.zoo.config.DecoderSpec`.
        vocab_size: number of token ids; the command line takes it from the data.
        lr: learning rate after the warm-up.
        weight_decay: of matrices; norms, biases, embeddings and state-space parameters have none.
        betas: of AdamW.
        ssm_lr: learning rate of state-space parameters; the smaller of `lr` and 0.001 when None.
        warmup_steps: steps over which the rate grows linearly.
        schedule: what follows: a cosine or a line down to `min_lr_ratio * lr`, or the constant
            rate.
        min_lr_ratio: where the cosine or the line ends.
        compile: compile every entry of the stack by torch.compile.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        *,
        vocab_size: int = VOCAB_SIZE,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        ssm_lr: float | None = None,
        warmup_steps: int = 100,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        min_lr_ratio: float = 0.1,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, lr=lr)
        # A checkpoint is read with weights_only: it may hold plain values only, no dataclass.
        spec = decoder if isinstance(decoder, DecoderSpec) else DecoderSpec.from_dict(decoder)
        self.save_hyperparameters(
            {
                "decoder": spec.to_dict(),
                "vocab_size": vocab_size,
                "lr": lr,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "ssm_lr": ssm_lr,
                "warmup_steps": warmup_steps,
                "schedule": schedule,
                "min_lr_ratio": min_lr_ratio,
                "compile": compile,
                "gradient_checkpointing": gradient_checkpointing,
            }
        )
        self.decoder = spec
        self.model: ZooPreTrainedModel | None = None
        self._clock = _Clock()

    @abstractmethod
    def build(self) -> ZooPreTrainedModel:
        """The model to train."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log what is measured on a batch of `val` or `test`."""
        raise NotImplementedError

    @property
    def first_steps(self) -> int:
        """Steps of a phase of its own before the task, with the same schedule."""
        return 0

    @property
    def network(self) -> ZooPreTrainedModel:
        """The model, built when it is not yet."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls this where a sharding strategy wants it built."""
        if self.model is not None:
            return
        self.model = self.build()
        if self.hparams["gradient_checkpointing"]:
            # transformers 5.23 gave it another name.
            new = getattr(self.model, "activation_checkpointing_enable", None)
            (new or self.model.gradient_checkpointing_enable)()
        if self.hparams["compile"]:
            for entry in self.model.model.entries:
                entry.compile()  # in place: the names in the state dict stay as they are

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss with its auxiliary parts."""
        out = self.network(**batch, use_cache=False)
        self.log("train/loss", out.loss, prog_bar=True)
        if out.aux_loss is not None:
            self.log("train/aux_loss", out.aux_loss)
        scalars = {k: v for k, v in (out.stats or {}).items() if v.numel() == 1}
        self.log_dict({f"train/{name}": value.float() for name, value in scalars.items()})
        self._clock.tokens += batch["input_ids"].numel()
        loss: Tensor = out.loss
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401
        """Tokens a second since the last time this was logged."""
        every = getattr(self.trainer, "log_every_n_steps", 0)
        if every and self.trainer.global_step % every == 0:
            self.log("train/tokens_per_second", self._clock.lap(), prog_bar=True)

    def on_validation_end(self) -> None:
        """Leave the time of validation out of the training rate."""
        self._clock.lap()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """See `evaluate`."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """See `evaluate`."""
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and the schedule, advanced once a step."""
        self.configure_model()
        optimizer = build_optimizer(
            self, betas=tuple(self.hparams["betas"]), **self._group_settings()
        )
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the schedule needs an end: give --trainer.max_steps or max_epochs")
        if steps <= self.first_steps:
            raise ValueError(
                f"pretrain_steps={self.first_steps} is not allowed: nothing is left of the "
                f"{int(steps)} steps in all; raise --trainer.max_steps"
            )
        constant = self.hparams["schedule"] == "constant"
        schedule = build_schedule(
            optimizer,
            warmup=self.hparams["warmup_steps"],
            total=int(steps),
            floor=1.0 if constant else self.hparams["min_lr_ratio"],
            shape=warmup_linear if self.hparams["schedule"] == "linear" else warmup_cosine,
            first=self.first_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """What was asked for now beats what a checkpoint brought back."""
        self._clock.lap()
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, Optimizer)
        assert isinstance(schedule, LambdaLR)
        override(optimizer, schedule, parameter_groups(self, **self._group_settings()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is needed to use the weights without the command line that made them."""
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer_name", None)
        checkpoint["seqzoo"] = {"task": type(self).__name__, "tokenizer": tokenizer}

    def config(self, **more: Any) -> ZooConfig:  # noqa: ANN401
        """Of the model; ids of special tokens only where bytes are read, which have them fixed."""
        size = self.hparams["vocab_size"]
        special: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        return ZooConfig(
            decoder=self.hparams["decoder"],
            vocab_size=size,
            **(special if size == VOCAB_SIZE else {}),
            **more,
        )

    def _group_settings(self) -> dict[str, Any]:
        return {name: self.hparams[name] for name in ("lr", "weight_decay", "ssm_lr")}


class LanguageModelling(Training):
    """Predict the next token."""

    def build(self) -> ZooPreTrainedModel:
        """See `Training.build`."""
        return ZooForCausalLM(self.config())

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Loss, and bits a byte or a token; auxiliary losses are no part of either."""
        losses, known = self._token_losses(batch)
        count = int(known.sum())
        loss = losses.sum() / max(count, 1)
        data = getattr(self.trainer, "datamodule", None)
        unit = "byte" if getattr(data, "tokenizer_name", None) is None else "token"
        figures = {f"{stage}/loss": loss, f"{stage}/bits_per_{unit}": loss / math.log(2)}
        self.log_dict(figures, batch_size=count, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Mean bits a token of every row."""
        losses, known = self._token_losses(batch)
        bits = losses.sum(1) / known.sum(1).clamp(min=1) / math.log(2)
        return [{"bits": row} for row in bits.tolist()]

    def _token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats of each next token and which of them count, (B, T-1)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.network(**inputs, use_cache=False).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses, targets != -100


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


class _Clock:
    """Tokens a second."""

    def __init__(self) -> None:
        self.tokens = 0
        self.since = time.perf_counter()

    def lap(self) -> float:
        """The rate since the last lap; starts the next one."""
        now = time.perf_counter()
        rate = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return rate
