"""What a person sees while it trains: a line every few seconds."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from trainer.lightning_module import LanguageModel


class Progress(pl.Callback):
    """Prints step, time, loss, learning rate and speed; reading the loss is the only wait for the device."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        """Print progress lines.

        Args:
            every_seconds: Time between two lines.
        """
        self.every_seconds = every_seconds
        self._last = 0.0
        self._last_step = 0
        self._last_elapsed = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to happen."""
        assert isinstance(pl_module, LanguageModel)
        count = sum(parameter.numel() for parameter in pl_module.model.parameters())
        budget = pl_module.clock.budget
        limits = [f"{budget:,.0f} s"] if budget is not None else []
        limits += [f"{trainer.max_steps:,} steps"] if trainer.max_steps > 0 else []
        print(
            f"training {count:,} parameters on {pl_module.device}, {trainer.precision}, attention: "
            f"{pl_module.kernel.describe()}, {'compiled' if pl_module.is_compiled else 'not compiled'}; "
            f"ends after {' or '.join(limits) or 'never: set a limit'}",
            flush=True,
        )
        self._last, self._last_step, self._last_elapsed = time.monotonic(), trainer.global_step, pl_module.clock.elapsed

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Print a line when it is time."""
        now = time.monotonic()
        if now - self._last < self.every_seconds:
            return
        assert isinstance(pl_module, LanguageModel)
        step, elapsed = int(trainer.global_step), pl_module.clock.elapsed
        tokens = (step - self._last_step) * trainer.datamodule.batch_tokens  # type: ignore[attr-defined]
        rate = tokens / max(elapsed - self._last_elapsed, 1e-9)
        budget = f"/{pl_module.clock.budget:,.0f}" if pl_module.clock.budget is not None else ""
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        print(
            f"step {step:>6,}  {elapsed:6.1f}{budget} s  loss {loss:.4f}  rate x{pl_module.lr_multiplier:.3f}  "
            f"{rate:>9,.0f} tokens/s",
            flush=True,
        )
        self._last, self._last_step, self._last_elapsed = now, step, elapsed

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the score."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.state.fn == "fit":
            print(f"step {trainer.global_step:>6,}  validation {pl_module.scores[-1].line()}", flush=True)
