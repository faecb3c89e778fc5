"""The kernels that compute attention."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.model.flash_attention import flash_attention

EXPANDED = ", keys and values expanded"  # in the description of a kernel
BackendName = Literal["auto", "fa4", "cudnn", "flash", "efficient", "math"]
BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class AttentionKernel(Protocol):
    """Causal attention."""

    @property
    def copies_kv(self) -> bool:
        """Whether it copies keys and values for every query head; who makes them may hand over copies."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: (B, S, H, d), queries of the last S positions.
            k: (B, T, K, d), keys of all positions; H is a multiple of K.
            v: (B, T, K, d).

        Returns:
            (B, S, H, d).
        """
        ...

    def describe(self) -> str:
        """The kernel in words, for the log."""
        ...


@dataclass(frozen=True)
class SdpaKernel:
    """torch's scaled_dot_product_attention.

    Attributes:
        backend: Name in BACKENDS, or None to let torch choose (on the CPU).
        expand_kv: Repeat keys and values per query head first, for kernels without native grouped queries.
    """

    backend: str | None = None
    expand_kv: bool = False

    @property
    def copies_kv(self) -> bool:
        """See AttentionKernel."""
        return self.expand_kv

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionKernel."""
        if q.size(1) < k.size(1):
            return _last_positions(q, k, v)
        if self.copies_kv:
            k, v = _expanded(q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, d)
        gqa = k.size(1) != q.size(1)
        if self.backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)
        with sdpa_kernel(BACKENDS[self.backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    def describe(self) -> str:
        """See AttentionKernel."""
        return f"{self.backend or 'torch chooses'}{EXPANDED if self.expand_kv else ''}"


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, T, K, d) as (B, T, H, d), unless they are that already."""
    groups = q.size(2) // k.size(2)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2))


def _last_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Few queries over many keys, with a mask: torch's causal flag would align the first query with the first key."""
    batch, length, heads, dim = q.shape
    total, kv_heads = k.size(1), k.size(2)
    # The query heads of a group as further queries of their key head: no copy of keys and values.
    q = q.view(batch, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    mask = mask.repeat(heads // kv_heads, 1)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    y = y.view(batch, kv_heads, heads // kv_heads, length, dim).permute(0, 3, 1, 2, 4)  # (B, S, K, H / K, d)
    return y.reshape(batch, length, heads, dim)


@dataclass(frozen=True)
class FlashAttention4:
    """The optional package flash-attn-4.

    Attributes:
        window: Tokens that a position looks back at, itself included; None: all.
        expand_kv: Repeat keys and values per query head first: with grouped queries, the backward pass adds up their
            gradients in float32 in the GPU's memory.
    """

    window: int | None = None
    expand_kv: bool = False

    @property
    def copies_kv(self) -> bool:
        """See AttentionKernel."""
        return self.expand_kv

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionKernel."""
        if self.copies_kv:
            k, v = _expanded(q, k, v)
        window = self.window if self.window and self.window < k.size(1) else 0  # one that covers all is none
        return flash_attention(q, k, v, window)[0]

    def describe(self) -> str:
        """See AttentionKernel."""
        return f"fa4{EXPANDED if self.expand_kv else ''}"


@dataclass(frozen=True)
class ByGradient:
    """One kernel where gradients are wanted and another where they are not: the fastest forward and backward is not
    always the fastest forward.

    Attributes:
        training: For the first.
        scoring: For the second.
    """

    training: AttentionKernel
    scoring: AttentionKernel

    @property
    def copies_kv(self) -> bool:
        """See AttentionKernel."""
        return self._now.copies_kv

    @property
    def _now(self) -> AttentionKernel:
        return self.training if torch.is_grad_enabled() else self.scoring

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionKernel."""
        return self._now(q, k, v)

    def describe(self) -> str:
        """See AttentionKernel."""
        return f"{self.training.describe()}; to score {self.scoring.describe()}"
