"""What a person sees during a run."""

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from trainer.cpu import busy_message
from trainer.datamodule import data_of
from trainer.device import peak_memory
from trainer.lightning_module import LanguageModel
from trainer.logging import logger
from trainer.progress_display import Mode, TrainingStatus, open_display

FEW_TOKENS = 10_000  # of validation text
LOAD_SECONDS = 60.0  # of training, after which the load of a minute is that of the training and of others


class Progress(pl.Callback):
    """Shows step, time, loss, learning rate and speed; it never waits for the device."""

    def __init__(self, mode: Mode = "auto", every_seconds: float = 10.0) -> None:
        """Show progress.

        Args:
            mode: How progress is shown: bar, lines, json (one object per line while it trains) or quiet (only
                warnings and the summary). auto is the bar in a terminal and lines elsewhere.
            every_seconds: Seconds between two lines (above 0).
        """
        self.mode = mode
        self.every_seconds = every_seconds

    @override
    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Log what is about to run."""
        parameters = sum(parameter.numel() for parameter in pl_module.model.parameters())
        budget = pl_module.clock.budget
        limits = [f"{budget:,.0f} s"] if budget is not None else []
        limits += [f"{trainer.max_steps:,} steps"] if trainer.max_steps > 0 else []
        kernels = [f"attention: {pl_module.attention.describe()}"]
        kernels += [f"fused: {pl_module.fused.describe()}"] if any(pl_module.fused) else []
        kernels += ["compiled" if pl_module.is_compiled else "not compiled"]
        pl_module.display = open_display(self.mode, self.every_seconds)
        if trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            logger.info(f"step {trainer.global_step:,}: nothing is left to train within {' or '.join(limits)}")
        logger.info(
            f"training {parameters:,} parameters on {pl_module.device}, {trainer.precision}, {', '.join(kernels)}; "
            f"ends after {' or '.join(limits) or 'never: set a limit'}"
        )
        data = data_of(trainer)
        assert data.table is not None
        read, scored = len(trainer.train_dataloader.dataset.files), len(data.val_tokens) - 1  # type: ignore[union-attr]
        few = " (so few that their scores are noisy)" if scored < FEW_TOKENS else ""
        logger.info(
            f"text in {data.text.train[0].parent}: {read:,} tokens for training, {scored:,} for validation{few}"
        )
        tokens = data.val_tokens.cpu().numpy().astype("uint16")
        self._bpb_per_nat = (len(tokens) - 1) / max(data.table.total(tokens), 1) / math.log(2)
        self._last, self._step, self._seconds = time.monotonic(), trainer.global_step, pl_module.clock.elapsed
        self._flops = pl_module.flops_done
        self._started, self._looked_at_load = self._last, False
        self._first_step, self._first_seconds = self._step, self._seconds

    @override
    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        """Show the status when it is time."""
        now = time.monotonic()
        if pl_module.device.type == "cpu" and trainer.world_size == 1:
            self._look_at_load(now)
        if now - self._last < pl_module.display.every_seconds or not pl_module.completed_metrics:
            return
        step, seconds, budget = trainer.global_step, pl_module.clock.elapsed, pl_module.clock.budget
        left = [budget - seconds] if budget is not None else []
        if trainer.max_steps > 0:
            seconds_per_step = (seconds - self._first_seconds) / max(step - self._first_step, 1)
            left.append((trainer.max_steps - step) * seconds_per_step)
        loss = float(pl_module.completed_metrics[-1][1][0])
        tokens = (step - self._step) * data_of(trainer).batch_tokens
        tokens_per_second = tokens / max(seconds - self._seconds, 1e-9)
        memory = peak_memory(pl_module.device)
        pl_module.display.show(
            TrainingStatus(
                step,
                seconds,
                budget,
                max(min(left), 0.0) if left else None,
                loss,
                loss * self._bpb_per_nat,
                pl_module.lr_multiplier,
                tokens_per_second,
                pl_module.mfu(pl_module.flops_done - self._flops, seconds - self._seconds),
                memory / 2**30 if memory is not None else None,
            )
        )
        self._last, self._step, self._seconds, self._flops = now, step, seconds, pl_module.flops_done

    def _look_at_load(self, now: float) -> None:
        """Say once if other processes keep the CPU busy, too."""
        if not self._looked_at_load and now - self._started > LOAD_SECONDS:
            self._looked_at_load = True
            if message := busy_message():
                logger.info(message)

    @override
    @rank_zero_only
    def on_validation_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn != "fit":
            pl_module.display = open_display(self.mode, self.every_seconds)

    @override
    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: LanguageModel,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how far the validation is."""
        name = "validation" if trainer.state.fn == "fit" else f"scoring {('plain', 'sliding')[dataloader_idx]}"
        pl_module.display.update_task(name, batch_idx + 1, int(trainer.num_val_batches[dataloader_idx]))

    @override
    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Log the score."""
        if trainer.state.fn == "fit":
            logger.info(f"step {trainer.global_step:>6,}  validation {pl_module.scores[-1].line()}")
        else:
            pl_module.display.close()

    @override
    @rank_zero_only
    def teardown(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Restore the terminal."""
        pl_module.display.close()

    @override
    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        """Restore the terminal."""
        pl_module.display.close()
