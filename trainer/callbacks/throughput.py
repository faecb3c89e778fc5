"""Learning rate, tokens per second and the share of the card's peak, logged with the loss."""

from typing import Any

import lightning.pytorch as pl

from trainer.lightning_module import LanguageModel
from trainer.model.arithmetic import forward_flops, peak_flops


class Throughput(pl.Callback):
    """Reads the training clock at every logged step; the clock is at most two steps ahead of the device."""

    def __init__(self) -> None:
        self._step = 0
        self._elapsed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step the run begins at."""
        assert isinstance(pl_module, LanguageModel)
        self._step, self._elapsed = pl_module.steps_done, pl_module.clock.elapsed

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log means since the last logged step; only then, since to log numbers waits for the device."""
        assert isinstance(pl_module, LanguageModel)
        step, elapsed = pl_module.steps_done, pl_module.clock.elapsed
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        budget = pl_module.clock.budget
        is_last = budget is not None and elapsed >= budget  # Lightning logs it too
        if step % every and not is_last:
            return
        tokens = (step - self._step) * trainer.datamodule.batch_tokens  # type: ignore[attr-defined]
        rate = tokens / max(elapsed - self._elapsed, 1e-9)
        self._step, self._elapsed = step, elapsed
        found = {"train/lr_multiplier": pl_module.lr_multiplier, "perf/tokens_per_second": rate}
        if (share := utilisation(pl_module, rate, trainer.world_size)) is not None:
            found["perf/utilisation"] = share
        pl_module.log_dict(found)


def utilisation(module: LanguageModel, tokens_per_second: float, world_size: int) -> float | None:
    """Share of all cards' peak arithmetic that training at this speed takes, where the peak is known."""
    peak = peak_flops(module.device)
    if peak is None:
        return None
    flops = forward_flops(module.model.config, module.sequence_length, module.model.is_looped)
    return tokens_per_second * 3 * flops / (peak * world_size)
