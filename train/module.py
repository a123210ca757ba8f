"""What every training shares, as a Lightning module around the zoo's classes; language models.

Logged: `train/loss`, `train/tokens_per_second`, `train/aux_loss` where mixers add one, and their
statistics by entry; `val/loss`, and `val/bits_per_byte` (`val/bits_per_token` with a tokenizer
other than bytes). The other tasks stand beside: `classification`, `token_classification`,
`retrieval`.
"""

import math
import time
from abc import abstractmethod
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from seqzoo.kernels.errors import check_positive
from seqzoo.train.optim import (
    build_optimizer,
    build_schedule,
    override,
    parameter_groups,
    warmup_cosine,
    warmup_linear,
)
from seqzoo.train.tokenizer import BOS, EOS, PAD, VOCAB_SIZE
from seqzoo.zoo.base import ZooOutput
from seqzoo.zoo.config import DecoderSpec, ZooConfig
from seqzoo.zoo.model import ZooForCausalLM, ZooPreTrainedModel

Batch = dict[str, Tensor]
# What the data tell the model, and what it hears from data that do not know.
LINKED: dict[str, Any] = {"vocab_size": 0, "n_classes": 0, "readout": "", "real_valued": False}


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

    by_token = False  # whether labels belong to their own positions, unlike a language model's

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

    def setup(self, stage: str) -> None:
        """Refuse data whose labels mean something else to this module, before any step."""
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "readout") and not self.by_token:
            raise ValueError(
                f"data {type(data).__name__} has an answer at each token; train it with "
                "`--model TokenClassification`"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss with its auxiliary parts."""
        out = self.output(batch)
        assert out.loss is not None
        self.log("train/loss", out.loss, prog_bar=True)
        if out.aux_loss is not None:
            self.log("train/aux_loss", out.aux_loss)
        scalars = {k: v for k, v in (out.stats or {}).items() if v.numel() == 1}
        self.log_dict({f"train/{name}": value.float() for name, value in scalars.items()})
        self._clock.tokens += batch["input_ids"].numel()
        return out.loss

    def output(self, batch: Batch) -> ZooOutput:
        """What the model makes of a batch, its `loss` included."""
        out: ZooOutput = self.network(**batch, use_cache=False)
        return out

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
