"""`last.ckpt` is the newest state, whether it is the best or not."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Newest(ModelCheckpoint):
    """Lightning's checkpoints, with `last.ckpt` written at every validation that may save.

    Lightning 2.6 writes it only together with another file, so while the monitored figure does not
    improve, a run that is killed would go on from its best validation instead of its last.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what Lightning saves, then the last state where it did not."""
        super().on_validation_end(trainer, pl_module)
        skipped = self._should_skip_saving_checkpoint(trainer)
        if self.save_last and not skipped and not self._should_save_on_train_epoch_end(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
