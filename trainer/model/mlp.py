"""The MLP of a block."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.kernels.fused_mlp import squared_relu_mlp
from trainer.model.layers import Linear


@dataclass(frozen=True)
class MLPConfig:
    """The MLP of every block.

    Args:
        ratio: Hidden width divided by the model width (at least 1).
    """

    ratio: int = 3

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"model.mlp.ratio must be at least 1, not {self.ratio}")


class MLP(nn.Module):
    """W2 relu(W1 x)^2 (squared ReLU: So et al. 2021, Primer)."""

    def __init__(self, config: MLPConfig, dim: int) -> None:
        super().__init__()
        self.up = Linear(dim, config.ratio * dim)
        self.down = Linear(config.ratio * dim, dim)
        self.is_fused = False

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), each channel times its `scale`, (D,)."""
        if self.is_fused:
            up, down = self.up.cast(x.dtype), self.down.cast(x.dtype, scale)
            return squared_relu_mlp(x.flatten(0, 1), up, down)[0].view_as(x)
        return self.down(self.up(x).relu().square(), scale)
