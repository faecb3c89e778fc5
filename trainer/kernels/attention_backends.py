"""The ways of computing attention: torch's backends and flash-attn-4."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from trainer.kernels.flash_attention import flash_attention

EXPANDED = ", keys and values expanded"  # in the description of a backend
BackendName = Literal["auto", "fa4", "cudnn", "flash", "efficient", "math"]
BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class AttentionBackend(Protocol):
    """Causal attention."""

    @property
    def copies_kv(self) -> bool:
        """Whether it copies keys and values for every query head; whoever makes them may hand over copies instead."""
        ...

    def key_before(self, k: Tensor) -> Tensor:
        """Key of the position before the first: that of the first itself, unless earlier ones are kept.

        Attention with a key offset asks once, before it attends: who keeps keys, keeps the last of these.

        Args:
            k: (B, T, K, d), before their offset.

        Returns:
            (B, 1, K, d).
        """
        return k[:, :1]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: (B, S, H, d), queries of the last S positions.
            k: (B, T, K, d), keys of all positions; H is a multiple of K.
            v: (B, T, K, d), values of all positions.

        Returns:
            (B, S, H, d).
        """
        ...

    def describe(self) -> str:
        """Its name, for the log."""
        ...


@dataclass(frozen=True)
class SdpaBackend(AttentionBackend):
    """torch's scaled_dot_product_attention.

    Attributes:
        backend: Name in BACKENDS, or None to let torch choose (on the CPU).
        copies_kv: Repeat keys and values for each query head first, for kernels without native grouped queries.
    """

    backend: str | None = None
    copies_kv: bool = False

    @override
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.size(1) < k.size(1):
            return _last_positions(q, k, v)
        if self.copies_kv:
            k, v = _expand(q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, d)
        gqa = k.size(1) != q.size(1)
        if self.backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)
        with sdpa_kernel(BACKENDS[self.backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    @override
    def describe(self) -> str:
        return f"{self.backend or 'torch default'}{EXPANDED if self.copies_kv else ''}"


def _expand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, T, K, d) as (B, T, H, d), unless they are that already."""
    groups = q.size(2) // k.size(2)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2))


def _last_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Few queries over many keys, with a mask: torch's causal flag would align the first query with the first key."""
    batch, length, heads, dim = q.shape
    total, kv_heads = k.size(1), k.size(2)
    # The query heads of a group become further queries of their key head: no copy of keys and values.
    q = q.view(batch, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    mask = mask.repeat(heads // kv_heads, 1)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    y = y.view(batch, kv_heads, heads // kv_heads, length, dim).permute(0, 3, 1, 2, 4)  # (B, S, K, H / K, d)
    return y.reshape(batch, length, heads, dim)


@dataclass(frozen=True)
class FlashAttention4(AttentionBackend):
    """The optional package flash-attn-4.

    Attributes:
        window: Attention window in tokens, the position itself included; None: full attention.
        copies_kv: Repeat keys and values for each query head first. With grouped queries, the backward pass adds up
            their gradients in float32 in the GPU's memory.
    """

    window: int | None = None
    copies_kv: bool = False

    @override
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.copies_kv:
            k, v = _expand(q, k, v)
        window = self.window if self.window and self.window < k.size(1) else 0  # one that covers everything is none
        return flash_attention(q, k, v, window)[0]

    @override
    def describe(self) -> str:
        return f"fa4{EXPANDED if self.copies_kv else ''}"


@dataclass(frozen=True)
class ByGradient(AttentionBackend):
    """One backend where gradients are wanted, another where they are not: the fastest forward pass is not always part
    of the fastest forward and backward pass.

    Attributes:
        training: Used with gradients.
        scoring: Used without.
    """

    training: AttentionBackend
    scoring: AttentionBackend

    @property
    @override
    def copies_kv(self) -> bool:
        return self._current.copies_kv

    @property
    def _current(self) -> AttentionBackend:
        return self.training if torch.is_grad_enabled() else self.scoring

    @override
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._current(q, k, v)

    @override
    def describe(self) -> str:
        return f"{self.training.describe()}; for scoring {self.scoring.describe()}"
