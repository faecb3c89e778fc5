"""The picture of a run, once its summary is there."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from trainer.errors import UserError
from trainer.report.build import NAME, build_report


class Report(pl.Callback):
    """Writes `report.html` into the run folder."""

    def __init__(self, enabled: bool = True) -> None:
        """Make the report when training has ended.

        Args:
            enabled: false leaves it to `trainer report`.
        """
        self.enabled = enabled

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Comes after the export."""
        folder = Path(str(trainer.log_dir))  # ranks agree on it, so all of them have to ask
        if self.enabled and trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.save()
            try:
                build_report([folder], folder / NAME)
            except UserError as error:  # the run itself is done and safe
                rank_zero_warn(f"no report was made: {error}")
