"""What a person sees while it trains."""

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from trainer.callbacks.throughput import utilisation
from trainer.lightning_module import LanguageModel
from trainer.progress_view import Facts, Mode, Quiet, View, make_view


class Progress(pl.Callback):
    """Shows step, time, loss, learning rate and speed; it never waits for the device."""

    def __init__(self, mode: Mode = "auto", every_seconds: float = 10.0) -> None:
        """Show progress.

        Args:
            mode: bar, lines, json (an object a line), quiet; auto is the bar in a terminal and lines elsewhere.
            every_seconds: Time between two lines.
        """
        self.mode = mode
        self.every_seconds = every_seconds
        self._view: View = Quiet()

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to happen."""
        assert isinstance(pl_module, LanguageModel)
        count = sum(parameter.numel() for parameter in pl_module.model.parameters())
        budget = pl_module.clock.budget
        limits = [f"{budget:,.0f} s"] if budget is not None else []
        limits += [f"{trainer.max_steps:,} steps"] if trainer.max_steps > 0 else []
        how = [f"attention: {pl_module.kernel.describe()}"]
        how += [f"fused: {pl_module.fused.describe()}"] if any(pl_module.fused) else []
        how += ["compiled" if pl_module.is_compiled else "not compiled"]
        self._view = make_view(self.mode, self.every_seconds)
        if trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            self._view.note(f"step {trainer.global_step:,}: nothing is left to train within {' or '.join(limits)}")
        self._view.note(
            f"training {count:,} parameters on {pl_module.device}, {trainer.precision}, {', '.join(how)}; "
            f"ends after {' or '.join(limits) or 'never: set a limit'}"
        )
        data = trainer.datamodule  # type: ignore[attr-defined]
        tokens = data.val_tokens.cpu().numpy().astype("uint16")
        self._bits_per_nat = (len(tokens) - 1) / max(data.table.total(tokens), 1) / math.log(2)
        self._last, self._step, self._seconds = time.monotonic(), trainer.global_step, pl_module.clock.elapsed
        self._first_step, self._first_seconds = self._step, self._seconds

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Show where the run is when it is time."""
        assert isinstance(pl_module, LanguageModel)
        now = time.monotonic()
        if now - self._last < self._view.every_seconds or not pl_module.finished:
            return
        step, seconds, budget = trainer.global_step, pl_module.clock.elapsed, pl_module.clock.budget
        left = [budget - seconds] if budget is not None else []
        if trainer.max_steps > 0:
            pace = (seconds - self._first_seconds) / max(step - self._first_step, 1)
            left.append((trainer.max_steps - step) * pace)
        loss = float(pl_module.finished[-1][1][0])
        rate = (step - self._step) * trainer.datamodule.batch_tokens / max(seconds - self._seconds, 1e-9)  # type: ignore[attr-defined]
        on_gpu = pl_module.device.type == "cuda"
        self._view.show(
            Facts(
                step,
                seconds,
                budget,
                max(min(left), 0.0) if left else None,
                loss,
                loss * self._bits_per_nat,
                pl_module.lr_multiplier,
                rate,
                utilisation(pl_module, rate, trainer.world_size),
                torch.cuda.max_memory_allocated(pl_module.device) / 2**30 if on_gpu else None,
            )
        )
        self._last, self._step, self._seconds = now, step, seconds

    @rank_zero_only
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside of training the view begins here."""
        if trainer.state.fn != "fit":
            self._view = make_view(self.mode, self.every_seconds)

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how far the validation is."""
        name = "validation" if trainer.state.fn == "fit" else f"scoring {('plain', 'sliding')[dataloader_idx]}"
        self._view.part(name, batch_idx + 1, int(trainer.num_val_batches[dataloader_idx]))

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the score."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.state.fn == "fit":
            self._view.note(f"step {trainer.global_step:>6,}  validation {pl_module.scores[-1].line()}")
        else:
            self._view.close()

    @rank_zero_only
    def part(self, name: str, done: int, total: int) -> None:
        """Show how far the export or one of its scores is."""
        self._view.part(name, done, total)

    @rank_zero_only
    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._view.note(text)

    @rank_zero_only
    def close(self) -> None:
        """Show no more; what follows is printed plainly."""
        self._view.close()

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Comes before the export, which shows its parts here."""
        self._view.note("exporting, and scoring what was exported")

    @rank_zero_only
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was, also without an export."""
        self._view.close()

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._view.close()
