"""Grouped-query attention with QK-norm and RoPE."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels import fused_heads
from trainer.kernels.attention_backends import AttentionBackend, BackendName, SdpaBackend
from trainer.model.layers import EPS, Linear, rms_norm


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of every block.

    Args:
        num_heads: Number of query heads (at least 1).
        num_kv_heads: Number of key and value heads (1 to num_heads, which it divides; GQA, Ainslie et al. 2023).
        rope_base: Base of the RoPE frequencies (above 0; Su et al. 2021).
        rope_dims: Channels of each head that RoPE rotates (even, at least 2); null: all of them (partial RoPE,
            openai/parameter-golf #434).
        key_offset: In blocks with full attention, take the channels of each key that RoPE leaves alone from the
            position before; needs rope_dims below the head's width (partial key offset,
            KellerJordan/modded-nanogpt #169).
        qk_gain_init: Initial value of each query head's learned gain (any number).
        xsa: Remove from each head's output its component along the position's own value (XSA, Zhai 2026,
            arXiv 2603.09078).
        gate_dims: Scale each head's output by a gate that reads this many channels of the input (1 to model_dim); null:
            no gate (sparse attention gate, KellerJordan/modded-nanogpt).
        window: Attention window of the S blocks in tokens, the position itself included (at least 1); null: all blocks
            have full attention. It saves time where the backend is fa4.
        window_pattern: Attention of successive blocks, repeated as often as needed: S has the window, L full attention.
        backend: Attention backend. auto takes the fastest of fa4 (optional package flash-attn-4), cudnn, flash and
            efficient that runs on this device, or math if none does.
    """

    num_heads: int = 8
    num_kv_heads: int = 4
    rope_base: float = 10000.0
    rope_dims: int | None = None
    key_offset: bool = False
    qk_gain_init: float = 1.5
    xsa: bool = False
    gate_dims: int | None = None
    window: int | None = None
    window_pattern: str = "SSL"
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"model.attention.num_heads must be at least 1, not {self.num_heads}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.attention.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.rope_dims is not None and (self.rope_dims < 2 or self.rope_dims % 2):
            raise ValueError(
                f"model.attention.rope_dims must be even and at least 2, or null for all, not {self.rope_dims}"
            )
        if not self.rope_base > 0:
            raise ValueError(f"model.attention.rope_base must be above 0, not {self.rope_base}")
        for name, value in (("gate_dims", self.gate_dims), ("window", self.window)):
            if value is not None and value < 1:
                raise ValueError(f"model.attention.{name} must be at least 1, or null for none, not {value}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"model.attention.window_pattern must consist of S (window) and L (full), not {self.window_pattern!r}"
            )

    def window_of(self, block: int) -> int | None:
        """Attention window of a block, counted from 0; None: full attention."""
        return self.window if self.window_pattern[block % len(self.window_pattern)] == "S" else None

    def has_key_offset(self, block: int) -> bool:
        """Whether a block, counted from 0, takes a part of its keys from the position before."""
        return self.key_offset and self.window_of(block) is None


@torch.compiler.assume_constant_result
@torch.no_grad()
def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device, rope_dims: int | None = None
) -> Tensor:
    """Cosine and signed sine of every position and channel; a compiled graph holds them as data.

    Inlined, each kernel that applies RoPE would compute its sines again: that took a sixth of a step.

    Args:
        length: Number of positions.
        head_dim: Channels of a head.
        base: Base of the frequencies.
        device: Where the tables go.
        rope_dims: Channels that are rotated, None: all; the others have frequency zero.

    Returns:
        (2, length, head_dim) float32; the sine's second half is negative, as `rotate` needs it.
    """
    rotated = rope_dims or head_dim
    frequencies = base ** (-torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated)
    frequencies = torch.cat((frequencies, frequencies.new_zeros((head_dim - rotated) // 2)))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)))


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of (B, T, H, d) by the angles of its position, (2, T, d)."""
    cos, sin = tables[:, :, None].to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def offset_keys(k: Tensor, key_before: Tensor, offset_from: int) -> Tensor:
    """Take some channels of each key from the position before.

    A query then finds a position by the token before it, so that one block can continue a sequence of tokens that it
    has seen.

    Args:
        k: (B, T, K, d).
        key_before: (B, 1, K, d), of the position before the first; at the start of a sequence the first itself.
        offset_from: First pair of channels, (c, d / 2 + c), that is taken.

    Returns:
        (B, T, K, d).
    """
    before = torch.cat((key_before, k[:, :-1]), dim=1)
    pair = torch.arange(k.size(-1), device=k.device) % (k.size(-1) // 2)
    return torch.where(pair >= offset_from, before, k)


def xsa(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its component along the value of the position itself (XSA).

    Args:
        y: (B, S, H, d), outputs.
        v: (B, S, K, d), values of the same positions.

    Returns:
        (B, S, H, d), orthogonal to the values.
    """
    direction = F.normalize(v, dim=-1)[:, :, :, None]  # (B, S, K, 1, d)
    grouped = y.unflatten(2, (v.size(2), -1))
    remainder = grouped - (grouped * direction).sum(-1, keepdim=True) * direction
    return remainder.flatten(2, 3).to(y.dtype)  # autocast normalizes and sums in float32


class Attention(nn.Module):
    """Causal self-attention of one block."""

    def __init__(
        self, config: AttentionConfig, dim: int, has_value_embedding: bool = False, has_key_offset: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.value_gain = nn.Parameter(torch.ones(config.num_kv_heads)) if has_value_embedding else None
        self.head_dim = dim // config.num_heads
        self.offset_from = (config.rope_dims or self.head_dim) // 2 if has_key_offset else None  # pair of channels
        self.q = Linear(dim, config.num_heads * self.head_dim)
        self.k = Linear(dim, config.num_kv_heads * self.head_dim)
        self.v = Linear(dim, config.num_kv_heads * self.head_dim)
        self.out = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.gate = nn.Parameter(torch.zeros(config.num_heads, config.gate_dims)) if config.gate_dims else None
        self.backend: AttentionBackend = SdpaBackend()
        self.is_fused = False
        self.has_hooks = False  # multiply by each matrix separately, so that hooks on them see their products

    def forward(
        self, x: Tensor, rotary: Tensor, scale: Tensor, start_pos: int = 0, value_embeddings: Tensor | None = None
    ) -> Tensor:
        """Attend, for positions from `start_pos` on.

        Args:
            x: (B, T, D).
            rotary: (2, T, d) of `rotary_tables`.
            scale: (D,) factor of each output channel.
            start_pos: First position whose output is wanted.
            value_embeddings: (B, T, K, d), added to the values where the block has a gain for them.

        Returns:
            (B, T - start_pos, D).
        """
        is_fused = self.is_fused and start_pos == 0
        q, k, v = self._qkv(x, rotary, start_pos, is_fused)
        if self.value_gain is not None and value_embeddings is not None:
            v = v + self.value_gain.to(v.dtype)[:, None] * value_embeddings
        y = self.backend(q, k, v)  # (B, S, H, d)
        factor = None if self.gate is None else self._factor(x[:, start_pos:], self.gate)
        if self.config.xsa and is_fused:
            y = fused_heads.xsa(y, v, factor)
        else:
            if self.config.xsa:
                y = xsa(y, v[:, start_pos:])
            if factor is not None:
                y = y * factor[..., None]
        return self.out(y.flatten(2), scale)

    def _factor(self, x: Tensor, gate: Tensor) -> Tensor:
        """Factor of each head, (B, S, H), one at the start."""
        return 2 * F.linear(x[..., : self.config.gate_dims], gate.to(x.dtype)).sigmoid()

    def _qkv(self, x: Tensor, rotary: Tensor, start_pos: int, is_fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from `start_pos` on, (B, S, H, d), keys and values of all positions, (B, T, K, d) or (B, T, H, d)."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # One product with all three matrices; they are separate parameters because Muon orthogonalizes each.
        if start_pos == 0:
            qkv = self._project(x, self.q, self.k, self.v)
            if is_fused:
                may_copy = self.backend.copies_kv and self.value_gain is None
                copies = heads // kv_heads if may_copy else 1
                return fused_heads.qk_norm_rope(qkv, rotary, self.q_gain, kv_heads, EPS, copies, self.offset_from)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        else:
            q = self._project(x[:, start_pos:], self.q)
            k, v = self._project(x, self.k, self.v).split((kv_heads, kv_heads), dim=2)
        q = rotate(rms_norm(q), rotary[:, start_pos:]) * self.q_gain.to(q.dtype)[:, None]
        k = rotate(rms_norm(k), rotary)
        if self.offset_from is not None:
            k = offset_keys(k, self.backend.key_before(k), self.offset_from)
        return q, k, v

    def _project(self, x: Tensor, *matrices: Linear) -> Tensor:
        if self.has_hooks:
            return torch.cat([matrix(x) for matrix in matrices], dim=2).unflatten(2, (-1, self.head_dim))
        weight = torch.cat([matrix.weight for matrix in matrices])
        return F.linear(x, weight.to(x.dtype)).unflatten(2, (-1, self.head_dim))
