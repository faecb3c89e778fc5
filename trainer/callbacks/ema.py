"""Exponential moving average of the weights, with a memory that grows with the run."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from trainer.callbacks.late_swa import LateSWA
from trainer.errors import UserError
from trainer.lightning_module import LanguageModel


class EMA(pl.Callback):
    """Averages in float32 on the device after every step; the live weights are never touched.

    The decay of step n is 1 - 1 / (1 + horizon * n), so that the same setting serves runs of any length: at the end the
    mean looks back over that share of the run (power-function averaging, Karras et al. 2024).
    """

    def __init__(self, horizon: float = 0.0) -> None:
        """Average weights over the whole run.

        Args:
            horizon: Share of the steps so far that the average remembers (0 to 1); 0 switches it off.

        Raises:
            ValueError: If the horizon is out of range.
        """
        if not 0 <= horizon <= 1:
            raise ValueError(f"ema.horizon must lie in [0, 1], not {horizon}")
        self.horizon = horizon
        self.mean: dict[str, Tensor] = {}
        self.count = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second average.

        Raises:
            UserError: If late SWA is on too.
        """
        others = [callback for callback in trainer.callbacks if isinstance(callback, LateSWA) and callback.start_frac]  # type: ignore[attr-defined]
        if self.horizon and others:
            raise UserError("ema.horizon and late_swa.start_frac are both set; switch one off with 0")

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Move the average towards the weights of this step."""
        assert isinstance(pl_module, LanguageModel)
        if not self.horizon:
            return
        live = pl_module.model.state_dict()
        if not self.mean:
            self.mean = {
                name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
                for name, tensor in live.items()
            }
        self.count += 1
        self.mean = {name: self.mean[name].to(tensor.device) for name, tensor in live.items()}
        weight = 1 / (1 + self.horizon * self.count)
        torch._foreach_lerp_(list(self.mean.values()), [live[name].to(self.mean[name].dtype) for name in live], weight)

    def averaged_state(self) -> dict[str, Tensor] | None:
        """The average, or None before the second step."""
        return dict(self.mean) if self.count > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of steps in it."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them, unless averaging is off by now."""
        if not self.horizon:
            return
        self.mean, self.count = dict(state_dict["mean"]), int(state_dict["count"])
