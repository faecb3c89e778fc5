"""Numbers that go bad: a loss or gradient that is not finite ends the run, a spike of the loss is said."""

import math
from collections import deque
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from trainer.errors import UserError
from trainer.lightning_module import LanguageModel


class Watch(pl.Callback):
    """Looks at each step's numbers once the device has done it, two steps later on a GPU.

    The update of a step with a bad gradient is never made, on no rank: the optimizer masks it on the device.
    """

    def __init__(
        self,
        nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 20,
        spike_sigmas: float = 6.0,
        spike_steps: int = 128,
    ) -> None:
        """Watch loss and gradients.

        Args:
            nonfinite: What a loss or gradient that is not finite does: stop the run, or skip the step's update.
            max_skipped: Updates that may be skipped in one run; with fp16, where the loss scale adapts, one after
                another.
            spike_sigmas: Say when a loss is so many standard deviations above the mean of the steps before.
            spike_steps: How many steps before.
        """
        if max_skipped < 1 or spike_steps < 2 or spike_sigmas <= 0:
            raise ValueError(
                "watch.max_skipped must be at least 1, watch.spike_steps at least 2 and watch.spike_sigmas above 0, "
                f"not {max_skipped}, {spike_steps} and {spike_sigmas}"
            )
        self.nonfinite = nonfinite
        self.max_skipped = max_skipped
        self.spike_sigmas = spike_sigmas
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=spike_steps)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look at the steps that are done by now; here, between two steps, what was trained can still be saved.

        Raises:
            UserError: If one's numbers are not finite and it may not be skipped.
        """
        assert isinstance(pl_module, LanguageModel)
        self._look(trainer, pl_module, pl_module.finished, may_stop=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the last steps, which are done anyway."""
        assert isinstance(pl_module, LanguageModel)
        self._look(trainer, pl_module, [*pl_module.finished, *pl_module.fence.drain()], may_stop=False)

    def _look(
        self, trainer: pl.Trainer, module: LanguageModel, steps: list[tuple[int, Tensor]], may_stop: bool
    ) -> None:
        for step, values in steps:
            loss, norm = values[:2].tolist()
            if torch.isfinite(values[1]):  # the same on all ranks, unlike the loss, and what the optimizer goes by
                self._look_for_spike(step, loss)
                if trainer.precision == "16-mixed":
                    self.skipped = 0
                continue
            self.skipped += 1
            said = (
                f"step {step}: the loss is {loss:.4g}, the gradient norm {norm:.4g}{_bad_tensors(module, values[2:])}"
            )
            if trainer.precision == "16-mixed" and self.skipped <= self.max_skipped:
                continue  # the loss scale halves itself
            if may_stop and (self.nonfinite == "stop" or self.skipped > self.max_skipped):
                tried = f" after {self.skipped - 1} skipped ones" if self.skipped > 1 else ""
                raise UserError(
                    f"{said}; this update{tried} was not made. "
                    "Lower the learning rate, or go on from an earlier checkpoint with --watch.nonfinite skip"
                )
            rank_zero_warn(f"{said}; skipped ({self.skipped} of at most {self.max_skipped})")

    def _look_for_spike(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if len(self._losses) == self._losses.maxlen:
            before = torch.tensor(self._losses, dtype=torch.float64)
            mean, sigma = float(before.mean()), float(before.std())
            if loss > mean + self.spike_sigmas * sigma:
                rank_zero_info(f"step {step}: the loss jumps to {loss:.4f} ({mean:.4f} +- {sigma:.4f} before)")
        self._losses.append(loss)


def _bad_tensors(module: LanguageModel, norms: Tensor) -> str:
    names = [name for name, parameter in module.model.named_parameters() if parameter.grad is not None]
    bad = [name for name, norm in zip(names, norms.tolist(), strict=True) if not torch.isfinite(torch.tensor(norm))]
    if not bad:
        return ""
    return f" (bad gradient: {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''})"
