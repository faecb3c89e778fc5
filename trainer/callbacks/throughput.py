"""Learning-rate multiplier, tokens per second and MFU, logged with the loss."""

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from trainer.datamodule import data_of
from trainer.lightning_module import LanguageModel


class Throughput(pl.Callback):
    """Reads the training clock at every logged step; the clock is at most two steps ahead of the device."""

    def __init__(self) -> None:
        self._step = 0
        self._elapsed = 0.0
        self._flops = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self._step, self._elapsed, self._flops = pl_module.steps_done, pl_module.clock.elapsed, pl_module.flops_done

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        """Log means since the last logged step; at other steps, logging host numbers would wait for the device."""
        step, elapsed = pl_module.steps_done, pl_module.clock.elapsed
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % every and not trainer.should_stop:  # Lightning logs the last step, too
            return
        tokens = (step - self._step) * data_of(trainer).batch_tokens
        seconds = elapsed - self._elapsed
        metrics = {
            "train/lr_multiplier": pl_module.lr_multiplier,
            "perf/tokens_per_second": tokens / max(seconds, 1e-9),
        }
        if (mfu := pl_module.mfu(pl_module.flops_done - self._flops, seconds)) is not None:
            metrics["perf/mfu"] = mfu
        self._step, self._elapsed, self._flops = step, elapsed, pl_module.flops_done
        pl_module.log_dict(metrics)
