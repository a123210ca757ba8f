"""Training runs to be killed: `python resume_runs.py SPECS.json` forks one process for each.

Every run appends a line to its log for each batch: global batch number, loss to the last bit, the
samples. Prints, as JSON, the exit status of each, negative for a signal.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from seqzoo.train import checkpoint
from seqzoo.train.checkpoint import SafeCheckpointIO, find_last
from seqzoo.train.data import Text
from seqzoo.train.guards import SaveOnSigterm, StopOnNaN
from seqzoo.train.resume import ExactResume
from seqzoo.train.tokenizer import VOCAB_SIZE, decode_bytes

SAMPLES, WIDTH = 100, 8  # training windows, bytes of each


class Tiny(LightningModule):
    """Embedding, dropout, linear: the loss depends on every random draw before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(VOCAB_SIZE, 16), nn.Dropout(0.3), nn.Linear(16, VOCAB_SIZE)
        )

    def loss(self, batch):
        logits = self.layers(batch["input_ids"])
        return nn.functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch) + 0 * torch.rand(()))  # draws, as users' code may

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Log(Callback):
    def __init__(self, spec):
        self.spec = spec

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen = [int(decode_bytes(row)[:7]) for row in batch["input_ids"]]
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        line = [number, trainer.current_epoch, float(outputs["loss"]).hex(), seen]
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        with Path(self.spec["log"] + suffix).open("a") as log:
            log.write(json.dumps(line) + "\n")
        if trainer.global_step == self.spec.get("kill_at"):
            os.kill(os.getpid(), self.spec.get("signal", signal.SIGKILL))


def kill_in_save(spec):
    """Die in a save: ["file", n] in the middle of the n-th file, ["rename", n] after n renames."""
    place, number = spec["kill_in_save"]
    calls = 0

    def count(act):
        def counted(self, *args):
            nonlocal calls
            result = act(self, *args)
            calls += 1
            if place == "rename" and calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if place == "file" and calls == number:
                self.write = lambda data: os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    owner, name = (Path, "replace") if place == "rename" else (checkpoint._Hashing, "__init__")
    setattr(owner, name, count(getattr(owner, name)))


def run(spec):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if "kill_in_save" in spec:
        kill_in_save(spec)
    folder = Path(spec["folder"])
    saver = ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=spec["save_every"], enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=spec.get("ranks", 1),
        strategy="ddp_fork" if spec.get("ranks", 1) > 1 else "auto",
        max_steps=spec.get("max_steps", 40),
        accumulate_grad_batches=spec.get("accumulate", 1),
        check_val_every_n_epoch=None,
        val_check_interval=5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Log(spec), saver, ExactResume(), StopOnNaN(), SaveOnSigterm()],
        plugins=[SafeCheckpointIO()],
    )
    data = Text(
        spec["text"], length=WIDTH, batch_size=8, num_workers=spec.get("workers", 0), seed=3
    )
    trainer.fit(Tiny(), data, ckpt_path=find_last(folder))


def main():
    statuses = []
    warnings.simplefilter("ignore")
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(spec)
                code = 0
            except SystemExit as leaving:
                code = leaving.code
            except ValueError as error:
                sys.stderr.write(f"ValueError: {error}\n")
                code = 2
            finally:
                sys.stderr.flush()
                os._exit(code)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(statuses))


if __name__ == "__main__":
    main()
