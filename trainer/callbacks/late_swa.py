"""Late stochastic weight averaging: the mean of snapshots taken while the learning rate is low.

Lightning's WeightAveraging is not used: it validates, and can end, on the initial weights (Lightning #21724).
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from trainer.checkpoint import averaged_state
from trainer.lightning_module import LanguageModel


class LateSWA(pl.Callback):
    """Sums snapshots in float32 on the device; the live weights are never touched."""

    def __init__(self, start_frac: float = 0.4, every: int = 50) -> None:
        """Average weights late in the run.

        Args:
            start_frac: Begin once the learning-rate multiplier is below this (0 to 1); 0 switches averaging off.
            every: Steps between snapshots.

        Raises:
            ValueError: If a value is out of range.
        """
        if not 0 <= start_frac <= 1 or every < 1:
            raise ValueError(f"late_swa: start_frac {start_frac} must lie in [0, 1] and every {every} be at least 1")
        self.start_frac = start_frac
        self.every = every
        self.sum: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take a snapshot when it is time."""
        assert isinstance(pl_module, LanguageModel)
        if pl_module.lr_multiplier >= self.start_frac or trainer.global_step % self.every:
            return
        for name, tensor in pl_module.model.state_dict().items():
            if name not in self.sum:
                self.sum[name] = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            self.sum[name] = self.sum[name].to(tensor.device).add_(tensor)
        self.count += 1

    def averaged_state(self) -> dict[str, Tensor] | None:
        """A copy of the mean, or None before the second snapshot."""
        return averaged_state(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Sum and count."""
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them, unless averaging is off by now."""
        if not self.start_frac:
            return
        self.sum, self.count = dict(state_dict["sum"]), int(state_dict["count"])
