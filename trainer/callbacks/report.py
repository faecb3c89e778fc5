"""The picture of a run, once its summary is there."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from trainer.report.build import NAME, build_report


class Report(pl.Callback):
    """Writes `report.html` into the run folder."""

    def __init__(self, enabled: bool = True) -> None:
        """Make the report when training has ended.

        Args:
            enabled: false leaves it to `trainer report`.
        """
        self.enabled = enabled

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Comes after the export."""
        if self.enabled and trainer.logger is not None:
            trainer.logger.save()
            folder = Path(str(trainer.log_dir))
            build_report([folder], folder / NAME)
