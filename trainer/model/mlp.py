"""The feed-forward part of a block."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.model.layers import Linear


@dataclass(frozen=True)
class MLPConfig:
    """The MLP of every block.

    Args:
        ratio: Hidden width over model width.
    """

    ratio: int = 3


class MLP(nn.Module):
    """W2 relu(W1 x)^2 (squared ReLU: So et al. 2021, Primer)."""

    def __init__(self, config: MLPConfig, dim: int) -> None:
        super().__init__()
        self.up = Linear(dim, config.ratio * dim)
        self.down = Linear(config.ratio * dim, dim)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), each channel times its `scale`, (D,)."""
        return self.down(self.up(x).relu().square(), scale)
