"""Grouped-query attention with rotary positions and normalised queries and keys."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention_kernel import AttentionKernel, BackendName, SdpaKernel
from trainer.model.layers import Linear, rms_norm


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of every block.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves num_heads / num_kv_heads query heads (GQA, Ainslie et al. 2023).
        rope_base: Base of the rotary frequencies (RoPE, Su et al. 2021).
        qk_gain_init: First value of the learned gain of each query head.
        backend: Kernel; auto takes the fastest of fa4 (optional package flash-attn-4), cudnn, flash, efficient and
            math that runs on this device.
    """

    num_heads: int = 8
    num_kv_heads: int = 4
    rope_base: float = 10000.0
    qk_gain_init: float = 1.5
    backend: BackendName = "auto"


@torch.compiler.assume_constant_result
@torch.no_grad()
def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Cosine and signed sine of every position and channel; a compiled graph holds them as data.

    Inlined, each kernel that turns queries or keys would compute its sines again: that took a sixth of a step.

    Returns:
        (2, length, head_dim) float32; the sine's second half is negative, as `rotate` needs it.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)))


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of (B, T, H, d) by its position's angles, (2, T, d)."""
    cos, sin = tables[:, :, None].to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention of one block."""

    def __init__(self, config: AttentionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = dim // config.num_heads
        self.q = Linear(dim, config.num_heads * self.head_dim)
        self.k = Linear(dim, config.num_kv_heads * self.head_dim)
        self.v = Linear(dim, config.num_kv_heads * self.head_dim)
        self.out = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.kernel: AttentionKernel = SdpaKernel()

    def forward(self, x: Tensor, rotary: Tensor, scale: Tensor, first: int = 0) -> Tensor:
        """Attend from position `first` on.

        Args:
            x: (B, T, D).
            rotary: (2, T, d) of `rotary_tables`.
            scale: (D,) factor of each output channel.
            first: First position whose output is wanted.

        Returns:
            (B, T - first, D).
        """
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # The three matrices as one product; they stay apart because Muon orthogonalises each.
        if first == 0:
            qkv = self._heads(x, self.q, self.k, self.v)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)  # (B, T, H, d), (B, T, K, d) twice
        else:
            q = self._heads(x[:, first:], self.q)
            k, v = self._heads(x, self.k, self.v).split((kv_heads, kv_heads), dim=2)
        q = rotate(rms_norm(q), rotary[:, first:]) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), rotary)
        return self.out(self.kernel(q, k, v).flatten(2), scale)

    def _heads(self, x: Tensor, *matrices: Linear) -> Tensor:
        weight = torch.cat([matrix.weight for matrix in matrices])
        return F.linear(x, weight.to(x.dtype)).unflatten(2, (-1, self.head_dim))
