"""Checkpoints of a run: the newest one, during and at the end of training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoint callback, in the run's own folder; keeps one file, `last.ckpt`."""

    def __init__(self, every: int = 1000) -> None:
        """Save while training.

        Args:
            every: Steps between two saves; one more is made when training ends or fails.
        """
        super().__init__(filename="last", every_n_train_steps=every, save_top_k=1, enable_version_counter=False)
        self.save_on_exception = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the folder inside the run's."""
        if stage == "fit":
            self.dirpath = str(Path(str(trainer.log_dir)) / "checkpoints")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save when it is time, and after the last step: before the export, which could fail."""
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if last:
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt", weights_only=False)
        else:
            super().on_train_batch_end(trainer, pl_module, *args)
