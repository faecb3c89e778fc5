"""The time budget: drives the training clock and ends the run.

Lightning's Timer is not used: it counts validation and its reading cannot reach a schedule.
"""

from typing import Any

import lightning.pytorch as pl
import torch

from trainer.clock import TrainingClock
from trainer.lightning_module import LanguageModel
from trainer.ranks import HostChannel


class WallclockCutoff(pl.Callback):
    """Stop after so many seconds of training; rank 0's clock counts for all."""

    def __init__(self, seconds: float | None = 2700.0, reserve: float = 0.0) -> None:
        """Set the budget.

        Args:
            seconds: Training time; compile warm-up, validation and export do not count. null: no limit.
            reserve: Part of it that training leaves to the measurements of the export on training text, which count.
        """
        if seconds is not None and seconds <= 0:
            raise ValueError(f"wallclock.seconds must be positive or null, not {seconds}")
        if reserve < 0 or (seconds is not None and reserve >= seconds):
            raise ValueError(f"wallclock.reserve must lie between 0 and wallclock.seconds, not {reserve}")
        self.reserve = reserve
        self.clock = TrainingClock(seconds if seconds is None else seconds - reserve)
        self._channel: HostChannel | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module this clock."""
        assert isinstance(pl_module, LanguageModel)
        pl_module.clock = self.clock
        self._channel = self._channel or HostChannel(trainer.world_size)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting, unless the time was over before; the warm-up callback comes before this one."""
        self._stop_if_over(trainer)
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Share rank 0's reading and stop all ranks at the same step."""
        self._read(trainer)
        self._stop_if_over(trainer)

    def _stop_if_over(self, trainer: pl.Trainer) -> None:
        if self.clock.budget is not None and self.clock.reading >= self.clock.budget:
            trainer.should_stop = True

    def _read(self, trainer: pl.Trainer) -> None:
        assert self._channel is not None
        self.clock.reading = self._channel.largest(self.clock.elapsed if trainer.is_global_zero else 0.0)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting, once the steps in flight are done."""
        _wait_for(pl_module.device)
        self.clock.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on counting."""
        _wait_for(pl_module.device)
        if trainer.training or trainer.state.fn == "fit":
            self.clock.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop for good; export does not count."""
        _wait_for(pl_module.device)
        self.clock.pause()
        self._read(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The time used."""
        return self.clock.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.clock.load_state_dict(state_dict)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
