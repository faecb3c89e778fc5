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

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to happen."""
        assert isinstance(pl_module, LanguageModel)
        count = sum(parameter.numel() for parameter in pl_module.model.parameters())
        budget = pl_module.clock.budget
        limits = [f"{budget:,.0f} s"] if budget is not None else []
        limits += [f"{trainer.max_steps:,} steps"] if trainer.max_steps > 0 else []
        how = [f"attention: {pl_module.kernel.describe()}"]
        how += ["fused MLP"] if pl_module.fused_mlp else []
        how += ["compiled" if pl_module.is_compiled else "not compiled"]
        print(
            f"training {count:,} parameters on {pl_module.device}, {trainer.precision}, {', '.join(how)}; "
            f"ends after {' or '.join(limits) or 'never: set a limit'}",
            flush=True,
        )
        self._last = time.monotonic()

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Print a line when it is time."""
        now = time.monotonic()
        if now - self._last < self.every_seconds:
            return
        assert isinstance(pl_module, LanguageModel)
        metrics, clock = trainer.callback_metrics, pl_module.clock
        budget = f"/{clock.budget:,.0f}" if clock.budget is not None else ""
        words = [
            f"step {trainer.global_step:>6,}",
            f"{clock.elapsed:6.1f}{budget} s",
            f"loss {float(metrics['train/loss']):.4f}",
            f"rate x{pl_module.lr_multiplier:.3f}",
        ]
        if "perf/tokens_per_second" in metrics:
            words.append(f"{float(metrics['perf/tokens_per_second']):>9,.0f} tokens/s")
        if "perf/utilisation" in metrics:
            words.append(f"{100 * float(metrics['perf/utilisation']):.0f} % of peak")
        print("  ".join(words), flush=True)
        self._last = now

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the score."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.state.fn == "fit":
            print(f"step {trainer.global_step:>6,}  validation {pl_module.scores[-1].line()}", flush=True)
