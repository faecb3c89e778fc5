"""Grouped-query attention with rotary positions and normalised queries and keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.errors import UserError
from trainer.model.layers import Linear, rms_norm

BackendName = Literal["auto", "cudnn", "flash", "efficient", "math"]
BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of every block.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves num_heads / num_kv_heads query heads (GQA, Ainslie et al. 2023).
        rope_base: Base of the rotary frequencies (RoPE, Su et al. 2021).
        qk_gain_init: First value of the learned gain of each query head.
        backend: Kernel of scaled_dot_product_attention; auto takes the first of cudnn, flash, efficient, math that
            runs on this device.
    """

    num_heads: int = 8
    num_kv_heads: int = 4
    rope_base: float = 10000.0
    qk_gain_init: float = 1.5
    backend: BackendName = "auto"


@dataclass(frozen=True)
class AttentionKernel:
    """How attention is computed on this device.

    Attributes:
        backend: The SDPA kernel, or None to let torch choose (on the CPU).
        expand_kv: Repeat keys and values per query head first, for kernels without native grouped queries.
    """

    backend: SDPBackend | None = None
    expand_kv: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of (B, H, T, d) queries over (B, K, T, d) keys and values; returns (B, H, T, d)."""
        groups = q.size(1) // k.size(1)
        if self.expand_kv and groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        gqa = k.size(1) != q.size(1)
        if self.backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    def describe(self) -> str:
        """The kernel in words, for the log."""
        names = {backend: name for name, backend in BACKENDS.items()}
        name = "torch's choice" if self.backend is None else names[self.backend]
        return f"{name}{', keys and values expanded' if self.expand_kv else ''}"


def choose_kernel(
    config: AttentionConfig, head_dim: int, length: int, device: torch.device, dtype: torch.dtype
) -> AttentionKernel:
    """Find the first kernel that really runs forward and backward at these shapes.

    A kernel without native grouped queries gets expanded keys and values before a slower kernel is tried: the
    published port fell back to the unfused `math` kernel for good.

    Raises:
        UserError: If the kernel that the config names does not run here.
    """
    if device.type != "cuda":
        if config.backend not in ("auto", "math"):
            raise UserError(f"model.attention.backend {config.backend!r} needs a CUDA device, not {device.type}")
        return AttentionKernel(SDPBackend.MATH if config.backend == "math" else None)
    names: Sequence[str] = list(BACKENDS) if config.backend == "auto" else [config.backend]
    for name in names:
        for expand_kv in (False, True):
            kernel = AttentionKernel(BACKENDS[name], expand_kv)
            if _runs(kernel, config, head_dim, length, device, dtype):
                return kernel
    raise UserError(f"model.attention.backend {config.backend!r} does not run on this device in {dtype}; use auto")


def _runs(
    kernel: AttentionKernel,
    config: AttentionConfig,
    head_dim: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    def heads(count: int) -> Tensor:
        return torch.randn(1, length, count, head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v = heads(config.num_heads), heads(config.num_kv_heads), heads(config.num_kv_heads)
    try:
        out = kernel(q, k, v)
        out.sum().backward()
        torch.cuda.synchronize(device)
    except RuntimeError:  # SDPA's "no available kernel", or the kernel's own refusal
        return False
    return bool(out.isfinite().all())


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
        self.kernel = AttentionKernel()

    def forward(self, x: Tensor, rotary: Tensor, scale: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), each channel times its `scale`, (D,); `rotary` is (2, T, head_dim)."""
        batch, length, dim = x.shape
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # One product for the three matrices; they stay apart because Muon orthogonalises each.
        weight = torch.cat((self.q.weight, self.k.weight, self.v.weight))
        qkv = F.linear(x, weight.to(x.dtype)).view(batch, length, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)  # (B, T, H, d), (B, T, K, d) twice
        q = rotate(rms_norm(q), rotary) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), rotary)
        y = self.kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, d)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim), scale)
