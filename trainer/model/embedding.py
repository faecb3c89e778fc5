"""The input of the model: token embedding, hashed bigram, and the SmearGate that mixes in the previous token."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.model.layers import Linear

BOS = 1  # begins every document in the challenge's shards


@dataclass(frozen=True)
class BigramConfig:
    """The hashed bigram embedding (BigramHash).

    Args:
        buckets: Rows of the table (at least 2); the last row is for the first token of a sequence. null: no table.
        dim: Width of the table, which is projected to the model width (at least 1).
        scale_init: Initial value of the learned scale (any number but 0, with which nothing is learned).
    """

    buckets: int | None = 10240
    dim: int = 128
    scale_init: float = 0.05

    def __post_init__(self) -> None:
        if self.buckets is not None and self.buckets < 2:
            raise ValueError(f"model.bigram.buckets must be at least 2, or null for no table, not {self.buckets}")
        if self.buckets is not None and not self.scale_init:
            raise ValueError("model.bigram.scale_init must not be 0: the table would get no gradients")
        if self.dim < 1:
            raise ValueError(f"model.bigram.dim must be at least 1, not {self.dim}")


@dataclass(frozen=True)
class SmearConfig:
    """The SmearGate, which mixes each position with the one before.

    Args:
        gate: What the gate depends on. per_channel: one learned gate per channel, the same for all tokens (the
            reference). per_token: one gate per position, computed from its token and closed at the start of a document
            (KellerJordan/modded-nanogpt).
        dims: How many channels of the embedding a per_token gate reads (at least 1).
    """

    gate: Literal["per_channel", "per_token"] = "per_channel"
    dims: int = 12

    def __post_init__(self) -> None:
        if self.dims < 1:
            raise ValueError(f"model.smear.dims must be at least 1, not {self.dims}")


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
    """An embedding of each token with its predecessor, by hash; initialized to zero."""

    def __init__(self, buckets: int, config: BigramConfig, model_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, config.dim)
        self.proj = Linear(config.dim, model_dim)
        self.scale = nn.Parameter(torch.tensor(config.scale_init))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Map (B, T) tokens to (B, T, D) of type `dtype`."""
        rows = self.table(bigram_buckets(ids, self.table.num_embeddings)).to(dtype)
        return self.proj(rows) * self.scale.to(dtype)


class SmearGate(nn.Module):
    """Mix each position with the one before.

    per_channel: (1 - g) x_i + g x_{i-1} with g = sigmoid(gate) and x_{-1} = 0, as in the reference. per_token:
    x_i + scale sigmoid(gate . x_i[:dims]) x_{i-1}; it starts as x_i and takes nothing across the start of a document.
    """

    def __init__(self, config: SmearConfig, model_dim: int) -> None:
        super().__init__()
        is_per_token = config.gate == "per_token"
        self.dims = config.dims
        self.gate = nn.Parameter(torch.zeros(config.dims if is_per_token else model_dim))
        self.scale = nn.Parameter(torch.zeros(())) if is_per_token else None

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Map (B, T, D) of the tokens (B, T) to (B, T, D)."""
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        if self.scale is None:
            g = self.gate.sigmoid().to(x.dtype)
            return (1 - g) * x + g * before
        g = (x[..., : self.dims] * self.gate.to(x.dtype)).sum(-1, keepdim=True).sigmoid()
        g = torch.where((ids == BOS)[..., None], 0.0, self.scale * g)
        return x + g.to(x.dtype) * before  # autocast sums in float32
