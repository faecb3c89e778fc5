"""Weight averaging: late SWA, the mean of snapshots taken while the learning rate is low, or EMA over the whole run.

Lightning's WeightAveraging is not used: it validates, and can end, on the initial weights (Lightning #21724).
"""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from trainer.checkpoint import averaged_state
from trainer.lightning_module import LanguageModel


class WeightAveraging(pl.Callback):
    """Averages in float32 on the device; the live weights are never touched."""

    def __init__(
        self,
        method: Literal["late_swa", "ema"] | None = "late_swa",
        start_frac: float = 0.4,
        every: int = 50,
        horizon: float = 0.03,
    ) -> None:
        """Average the weights of a run.

        Args:
            method: How weights are averaged. late_swa: the mean of snapshots late in the run. ema: an exponential
                moving average over the whole run, with the decay 1 - 1 / (1 + horizon * n) at step n, so that one
                setting suits runs of any length (power-function averaging, Karras et al. 2024). null: no average.
            start_frac: Late SWA takes snapshots while the learning rate is below this share of its full value (above 0,
                at most 1).
            every: Steps between two snapshots of late SWA (at least 1).
            horizon: Share of the steps so far that the EMA covers (above 0, at most 1).

        Raises:
            ValueError: If a value is out of range.
        """
        if not 0 < start_frac <= 1 or every < 1:
            raise ValueError(
                f"averaging.start_frac {start_frac} must be in (0, 1] and averaging.every {every} be at least 1; "
                "averaging.method null makes no average"
            )
        if not 0 < horizon <= 1:
            raise ValueError(
                f"averaging.horizon must be in (0, 1], not {horizon}; averaging.method null makes no average"
            )
        self.method = method
        self.start_frac = start_frac
        self.every = every
        self.horizon = horizon
        self.weights: dict[str, Tensor] = {}  # late SWA: the sum of the snapshots; EMA: the average
        self.count = 0
        self.budget: list[float | None] | None = None  # of the run that the snapshots belong to: steps and seconds

    @override
    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        budget = [float(trainer.max_steps), pl_module.clock.budget]
        # Snapshots belong to the end of one schedule: not to a run with another one, or whose rate is high again.
        is_other = self.budget not in (None, budget) or pl_module.lr_multiplier >= self.start_frac
        if self.method == "late_swa" and is_other:
            self.weights, self.count = {}, 0
        self.budget = budget
        is_snapshot = pl_module.lr_multiplier < self.start_frac and trainer.global_step % self.every == 0
        if self.method is None or (self.method == "late_swa" and not is_snapshot):
            return
        live = pl_module.model.state_dict()
        if not self.weights:
            self.weights = {
                name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
                for name, tensor in live.items()
            }
            if self.method == "late_swa":
                self.count = 1
                return
        self.count += 1
        self.weights = {name: self.weights[name].to(tensor.device) for name, tensor in live.items()}
        values = [live[name].to(tensor.dtype) for name, tensor in self.weights.items()]
        if self.method == "late_swa":
            torch._foreach_add_(list(self.weights.values()), values)
        else:
            torch._foreach_lerp_(list(self.weights.values()), values, 1 / (1 + self.horizon * self.count))

    def averaged_state(self) -> dict[str, Tensor] | None:
        """A copy of the average, or None before the second snapshot or step."""
        return averaged_state(self.state_dict())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method, "weights": self.weights, "count": self.count, "budget": self.budget}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the average, unless this run makes none or another one."""
        if self.method is not None and self.method == state_dict["method"]:
            self.weights, self.count = dict(state_dict["weights"]), int(state_dict["count"])
            self.budget = state_dict["budget"]
