"""Grouped-query attention with rotary positions and normalised queries and keys."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model import fused_heads
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
        rope_dims: Channels of each head that turn with the position; null: all (partial RoPE,
            openai/parameter-golf #434).
        exclusive: Take out of each head's output its component along the position's own value (XSA,
            Zhai 2026, arXiv 2603.09078).
        gate_dims: Scale each head's output by a gate that looks at so many channels of the input; 0: no gate (sparse
            attention gate, KellerJordan/modded-nanogpt).
        window: Tokens that a position looks back at, itself included (Beltagy et al. 2020); null: all. Saves time where
            the kernel is fa4.
        full_every: Blocks n, 2n, 3n and so on, counted from 1, have no window.
        backend: Kernel; auto takes the fastest of fa4 (optional package flash-attn-4), cudnn, flash and efficient that
            runs on this device, or math if none does.
    """

    num_heads: int = 8
    num_kv_heads: int = 4
    rope_base: float = 10000.0
    qk_gain_init: float = 1.5
    rope_dims: int | None = None
    exclusive: bool = False
    gate_dims: int = 0
    window: int | None = None
    full_every: int = 3
    backend: BackendName = "auto"

    def window_of(self, block: int) -> int | None:
        """Tokens that a block looks back at, counted from 0; None: all."""
        return None if (block + 1) % self.full_every == 0 else self.window


@torch.compiler.assume_constant_result
@torch.no_grad()
def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device, rope_dims: int | None = None
) -> Tensor:
    """Cosine and signed sine of every position and channel; a compiled graph holds them as data.

    Inlined, each kernel that turns queries or keys would compute its sines again: that took a sixth of a step.

    Args:
        length: Positions.
        head_dim: Channels of a head.
        base: Of the frequencies.
        device: Where the tables go.
        rope_dims: Channels that turn, None: all; the others have frequency zero.

    Returns:
        (2, length, head_dim) float32; the sine's second half is negative, as `rotate` needs it.
    """
    turning = rope_dims or head_dim
    frequencies = base ** (-torch.arange(0, turning, 2, device=device, dtype=torch.float32) / turning)
    frequencies = torch.cat((frequencies, frequencies.new_zeros((head_dim - turning) // 2)))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)))


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of (B, T, H, d) by its position's angles, (2, T, d)."""
    cos, sin = tables[:, :, None].to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Take out of each head's output its component along the value of the position itself.

    Args:
        y: (B, S, H, d), outputs.
        v: (B, S, K, d), values of the same positions.

    Returns:
        (B, S, H, d), orthogonal to the values.
    """
    own = F.normalize(v, dim=-1)[:, :, :, None]  # (B, S, K, 1, d)
    grouped = y.unflatten(2, (v.size(2), -1))
    left = grouped - (grouped * own).sum(-1, keepdim=True) * own
    return left.flatten(2, 3).to(y.dtype)  # autocast normalises and sums in float32


class Attention(nn.Module):
    """Causal self-attention of one block."""

    def __init__(self, config: AttentionConfig, dim: int, has_token_values: bool = False) -> None:
        super().__init__()
        self.config = config
        self.value_gain = nn.Parameter(torch.ones(config.num_kv_heads)) if has_token_values else None
        self.head_dim = dim // config.num_heads
        self.q = Linear(dim, config.num_heads * self.head_dim)
        self.k = Linear(dim, config.num_kv_heads * self.head_dim)
        self.v = Linear(dim, config.num_kv_heads * self.head_dim)
        self.out = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.gate = nn.Parameter(torch.zeros(config.num_heads, config.gate_dims)) if config.gate_dims else None
        self.kernel: AttentionKernel = SdpaKernel()
        self.is_fused = False
        self.has_hooks = False  # multiply with each matrix by itself, so that hooks on them see their products

    def forward(
        self, x: Tensor, rotary: Tensor, scale: Tensor, first: int = 0, token_values: Tensor | None = None
    ) -> Tensor:
        """Attend from position `first` on.

        Args:
            x: (B, T, D).
            rotary: (2, T, d) of `rotary_tables`.
            scale: (D,) factor of each output channel.
            first: First position whose output is wanted.
            token_values: (B, T, K, d) to add to the values where the block has a gain for them.

        Returns:
            (B, T - first, D).
        """
        is_fused = self.is_fused and first == 0
        q, k, v = self._turned_heads(x, rotary, first, is_fused)
        if self.value_gain is not None and token_values is not None:
            v = v + self.value_gain.to(v.dtype)[:, None] * token_values
        y = self.kernel(q, k, v)  # (B, S, H, d)
        if self.config.exclusive:
            y = fused_heads.without_own_value(y, v) if is_fused else without_own_value(y, v[:, first:])
        if self.gate is not None:
            gate = F.linear(x[:, first:, : self.config.gate_dims], self.gate.to(x.dtype))
            y = y * (2 * gate.sigmoid())[..., None]  # one at the start
        return self.out(y.flatten(2), scale)

    def _turned_heads(self, x: Tensor, rotary: Tensor, first: int, is_fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from position `first` on, (B, S, H, d), keys and values of all, (B, T, K, d) or (B, T, H, d)."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # The three matrices as one product; they stay apart because Muon orthogonalises each.
        if first == 0:
            qkv = self._heads(x, self.q, self.k, self.v)
            if is_fused:
                may_copy = self.kernel.copies_kv and self.value_gain is None
                return fused_heads.turned_heads(
                    qkv, rotary, self.q_gain, kv_heads, heads // kv_heads if may_copy else 1
                )
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        else:
            q = self._heads(x[:, first:], self.q)
            k, v = self._heads(x, self.k, self.v).split((kv_heads, kv_heads), dim=2)
        q = rotate(rms_norm(q), rotary[:, first:]) * self.q_gain.to(q.dtype)[:, None]
        return q, rotate(rms_norm(k), rotary), v

    def _heads(self, x: Tensor, *matrices: Linear) -> Tensor:
        if self.has_hooks:
            return torch.cat([matrix(x) for matrix in matrices], dim=2).unflatten(2, (-1, self.head_dim))
        weight = torch.cat([matrix.weight for matrix in matrices])
        return F.linear(x, weight.to(x.dtype)).unflatten(2, (-1, self.head_dim))
