"""The feed-forward part of a block."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.fused_mlp import squared_relu_mlp
from trainer.model.layers import Linear


@dataclass(frozen=True)
class MLPConfig:
    """The MLP of every block.

    Args:
        ratio: Hidden width over model width.
        negative_slope: Slope of the unit below zero: LeakyReLU^2 instead of ReLU^2 where it is not 0
            (openai/parameter-golf #434).
    """

    ratio: int = 3
    negative_slope: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.negative_slope <= 1:
            raise ValueError(f"mlp.negative_slope must lie between 0 and 1, not {self.negative_slope}")


class MLP(nn.Module):
    """W2 relu(W1 x)^2 (squared ReLU: So et al. 2021, Primer), or with a leaky unit."""

    def __init__(self, config: MLPConfig, dim: int) -> None:
        super().__init__()
        self.up = Linear(dim, config.ratio * dim)
        self.down = Linear(config.ratio * dim, dim)
        self.negative_slope = config.negative_slope
        self.is_fused = False

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), each channel times its `scale`, (D,)."""
        if self.is_fused:
            up, down = self.up.cast(x.dtype), self.down.cast(x.dtype, scale)
            return squared_relu_mlp(x.flatten(0, 1), up, down, self.negative_slope)[0].view_as(x)
        hidden = self.up(x)
        hidden = F.leaky_relu(hidden, self.negative_slope) if self.negative_slope else hidden.relu()
        return self.down(hidden.square(), scale)
