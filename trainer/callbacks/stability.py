"""Stability monitor: a loss or gradient that is not finite ends the run, a spike of the loss is logged as a warning."""

import math
from collections import deque
from copy import copy
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from trainer.errors import UserError
from trainer.lightning_module import LanguageModel
from trainer.logging import logger


class StabilityMonitor(pl.Callback):
    """Checks the metrics of each step once the device has completed it, two steps later on a GPU.

    The update of a step with a bad gradient is never made, on any process: the optimizer masks it on the device.
    """

    def __init__(
        self,
        nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 20,
        threshold_std: float = 6.0,
        history_steps: int = 128,
    ) -> None:
        """Check loss and gradients.

        Args:
            nonfinite: What happens when a loss or gradient is not finite: stop the run, or skip the update of its step.
            max_skipped: Most updates that a run may skip (at least 1). With fp16, where the loss scale adapts, it
                limits the skipped updates in a row.
            threshold_std: A warning is logged when the loss is more than this many standard deviations above its recent
                mean (above 0).
            history_steps: Number of steps that the recent mean and deviation cover (at least 2).
        """
        if max_skipped < 1 or history_steps < 2 or threshold_std <= 0:
            raise ValueError(
                "stability.max_skipped must be at least 1, stability.history_steps at least 2 and "
                f"stability.threshold_std above 0, not {max_skipped}, {history_steps} and {threshold_std}"
            )
        self.nonfinite = nonfinite
        self.max_skipped = max_skipped
        self.threshold_std = threshold_std
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=history_steps)
        self._checked = 0  # the last step that was
        self._module: LanguageModel | None = None
        self._scales = False  # whether the loss is scaled, as with fp16

    @override
    def state_dict(self) -> dict[str, Any]:
        """As after the check of all steps that a checkpoint of now holds."""
        then = copy(self)
        then._losses = self._losses.copy()
        if self._module is not None:
            self._module.completed_metrics += self._module.fence.drain()
            for step, values in self._module.completed_metrics:
                if step > self._checked:
                    then._count(*values[:2].tolist())
        return {"skipped": then.skipped, "losses": list(then._losses)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = int(state_dict["skipped"])
        self._losses.extend(state_dict["losses"])

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        """Check the steps completed by now; between two steps, what was trained can still be saved.

        Raises:
            UserError: If a step is not finite and may not be skipped.
        """
        self._check(trainer, pl_module, pl_module.completed_metrics, may_stop=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self._check(trainer, pl_module, [*pl_module.completed_metrics, *pl_module.fence.drain()], may_stop=False)

    def _check(
        self, trainer: pl.Trainer, module: LanguageModel, steps: list[tuple[int, Tensor]], may_stop: bool
    ) -> None:
        self._module, self._scales = module, trainer.precision == "16-mixed"
        for step, values in steps:
            loss, norm = values[:2].tolist()
            self._checked = step
            is_finite = math.isfinite(norm)  # what the optimizer checks, too
            if is_finite:
                self._check_spike(step, loss)
            self._count(loss, norm)
            if is_finite:
                continue
            problem = (
                f"step {step}: the loss is {loss:.4g}, the gradient norm {norm:.4g}{_bad_tensors(module, values[2:])}"
            )
            if self._scales and self.skipped <= self.max_skipped:
                continue  # the loss scale halves itself
            if may_stop and (self.nonfinite == "stop" or self.skipped > self.max_skipped):
                after = f" after {self.skipped - 1} skipped ones" if self.skipped > 1 else ""
                raise UserError(
                    f"{problem}; this update{after} was not made. "
                    "Lower the learning rate, or resume from an earlier checkpoint with --stability.nonfinite skip"
                )
            logger.warning(f"{problem}; skipped ({self.skipped} of at most {self.max_skipped})")

    def _count(self, loss: float, norm: float) -> None:
        if not math.isfinite(norm):
            self.skipped += 1
            return
        if self._scales:
            self.skipped = 0
        if math.isfinite(loss):
            self._losses.append(loss)

    def _check_spike(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if len(self._losses) == self._losses.maxlen:
            recent = torch.tensor(self._losses, dtype=torch.float64)
            mean, std = float(recent.mean()), float(recent.std())
            if loss > mean + self.threshold_std * std:
                logger.warning(f"step {step}: the loss jumped to {loss:.4f} ({mean:.4f} +- {std:.4f} before)")


def _bad_tensors(module: LanguageModel, norms: Tensor) -> str:
    bad = [name for name, norm in zip(module.clipped, norms.tolist(), strict=True) if not math.isfinite(norm)]
    if not bad:
        return ""
    return f" (bad gradient: {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''})"
