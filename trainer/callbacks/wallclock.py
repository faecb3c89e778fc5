"""The time budget: runs the training clock and ends the run.

Lightning's Timer is not used: it counts validation, and a schedule cannot read it.
"""

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from trainer.clock import TrainingClock
from trainer.device import synchronize
from trainer.distributed import HostChannel
from trainer.lightning_module import LanguageModel


class WallclockCutoff(pl.Callback):
    """Stops after a number of seconds of training; the clock of rank 0 counts for all processes."""

    def __init__(self, seconds: float | None = 2700.0, reserve: float = 0.0) -> None:
        """Set the time budget.

        Args:
            seconds: Training time in seconds (above 0); compile warm-up, validation and export do not count. null: no
                limit.
            reserve: Seconds of wallclock.seconds kept for calibrating the export on training text, which counts as
                training (at least 0).
        """
        if seconds is not None and seconds <= 0:
            raise ValueError(f"wallclock.seconds must be positive or null, not {seconds}")
        if reserve < 0 or (seconds is not None and reserve >= seconds):
            raise ValueError(f"wallclock.reserve must be between 0 and wallclock.seconds, not {reserve}")
        self.reserve = reserve
        self.clock = TrainingClock(seconds if seconds is None else seconds - reserve)
        self._channel: HostChannel | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        pl_module.clock = self.clock
        self._channel = self._channel or HostChannel(trainer.world_size)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Start the clock, unless the time is over; the warm-up comes before this callback."""
        self._stop_if_over(trainer)
        if not trainer.should_stop:
            self.clock.start()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        """Share the reading of rank 0, and stop all processes at the same step."""
        self._read(trainer)
        self._stop_if_over(trainer)

    def _stop_if_over(self, trainer: pl.Trainer) -> None:
        if self.clock.budget is not None and self.clock.reading >= self.clock.budget:
            trainer.should_stop = True

    def _read(self, trainer: pl.Trainer) -> None:
        assert self._channel is not None
        self.clock.reading = self._channel.largest(self.clock.elapsed if trainer.is_global_zero else 0.0)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Pause the clock, once the steps in flight are completed."""
        synchronize(pl_module.device)
        self.clock.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        synchronize(pl_module.device)
        if trainer.training or trainer.state.fn == "fit":
            self.clock.start()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Stop the clock; the export does not count."""
        synchronize(pl_module.device)
        self.clock.pause()
        self._read(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.clock.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.load_state_dict(state_dict)
