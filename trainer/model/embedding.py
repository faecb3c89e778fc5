"""What a token brings into the model: its embedding, a hashed bigram, and a gate that mixes in the token before."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.tokenizer import BOS
from trainer.model.layers import Linear


@dataclass(frozen=True)
class BigramConfig:
    """The hashed bigram embedding.

    Args:
        buckets: Rows of the table; the last is for a sequence's first token. 0: no table.
        dim: Width of the table, projected to the model's.
        scale_init: First value of the learned scale.
    """

    buckets: int = 10240
    dim: int = 128
    scale_init: float = 0.05


def bigram_buckets(ids: Tensor, buckets: int) -> Tensor:
    """Bucket of every position: (36313 t_i XOR 27191 t_{i-1}) mod (buckets - 1) in int32; the first has its own.

    Args:
        ids: (B, T) tokens.
        buckets: Number of buckets.

    Returns:
        (B, T) int32. Source: openai/parameter-golf, record 2026-03-20_10L_Int5MLP_MuonWD04_SWA50.
    """
    ids = ids.to(torch.int32)
    hashed = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])).remainder(buckets - 1)
    return torch.cat((torch.full_like(ids[:, :1], buckets - 1), hashed), dim=1)


class BigramHash(nn.Module):
    """An embedding of each token with its predecessor, by hash; starts at zero."""

    def __init__(self, config: BigramConfig, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(config.buckets, config.dim)
        self.proj = Linear(config.dim, dim)
        self.scale = nn.Parameter(torch.tensor(config.scale_init))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Map (B, T) tokens to (B, T, D) of type `dtype`."""
        rows = self.table(bigram_buckets(ids, self.table.num_embeddings)).to(dtype)
        return self.proj(rows) * self.scale.to(dtype)


class SmearGate(nn.Module):
    """Mix each position with the one before.

    Without `dims`, per channel as in the reference: (1 - g) x_i + g x_{i-1}, g = sigmoid(gate), x_{-1} = 0. With them,
    x_i + scale sigmoid(gate . x_i[:dims]) x_{i-1}, which begins as x_i and takes nothing across the start of a document
    (KellerJordan/modded-nanogpt).
    """

    def __init__(self, dim: int, dims: int = 0) -> None:
        super().__init__()
        self.dims = dims
        self.gate = nn.Parameter(torch.zeros(dims or dim))
        self.scale = nn.Parameter(torch.zeros(())) if dims else None

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Map (B, T, D) of the tokens (B, T) to (B, T, D)."""
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        if self.scale is None:
            g = self.gate.sigmoid().to(x.dtype)
            return (1 - g) * x + g * before
        g = (x[..., : self.dims] * self.gate.to(x.dtype)).sum(-1, keepdim=True).sigmoid()
        g = torch.where((ids == BOS)[..., None], 0.0, self.scale * g)
        return x + g.to(x.dtype) * before  # autocast sums in float32
