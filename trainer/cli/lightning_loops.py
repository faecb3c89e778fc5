"""What this trainer changes in Lightning's loops, for which it has no arguments."""

from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override


class FitLoop(_FitLoop):
    """Ends a resumed run properly that has nothing left to train: it exports, as it could not before."""

    @property
    def skip(self) -> bool:
        """Whether `on_train_start` and `on_train_end` are skipped too."""
        return super().skip and not self.restarting


class EpochLoop(_TrainingEpochLoop):
    """Validates by training time, too, and counts the optimizer's steps.

    Lightning's own interval in seconds is each process's own and counts pauses. Its own counts of a resumed run, by
    which it labels metrics and validates, are off by one unless the checkpoint was saved in `on_train_batch_end`.
    """

    @override
    def reset(self) -> None:
        is_resumed = self.restarting
        super().reset()
        if is_resumed:
            for counts in (self.batch_progress.total, self.batch_progress.current):
                for name in ("ready", "started", "processed", "completed"):
                    setattr(counts, name, self.global_step)

    @override
    def advance(self, data_fetcher: Any) -> None:
        step = self.global_step
        self._batches_that_stepped = step
        super().advance(data_fetcher)
        if self.global_step == step:  # only the validation after the step before is made up for
            self._batches_that_stepped = step - 1

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        is_due = self._should_check_val_epoch() and self.trainer.lightning_module.is_validation_due
        return is_due or super()._should_check_val_fx(data_fetcher)


class CheckpointConnector(_CheckpointConnector):
    """Loads no file that was not asked for: under SLURM, Lightning would take a `hpc_ckpt_*.ckpt` that lies around."""

    @property
    def _hpc_resume_path(self) -> None:
        return None
