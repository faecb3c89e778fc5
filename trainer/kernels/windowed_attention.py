"""Attention with a window: each position attends to a fixed number of tokens (Beltagy et al. 2020).

flash-attn-4 supports windows itself and is faster with them. Around any other backend, each block of positions attends
to itself and to the block before, with a mask: no faster than full attention, unless the text is long.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from trainer.kernels.attention_backends import AttentionBackend, ByGradient, FlashAttention4


@dataclass(frozen=True)
class WindowedAttention(AttentionBackend):
    """Another backend for sequences up to the window, and blocks with a mask beyond.

    Attributes:
        inner: The backend for sequences that are not longer than the window.
        window: Tokens that a position attends to, itself included.
    """

    inner: AttentionBackend
    window: int
    copies_kv: ClassVar[bool] = False  # it copies them itself, block by block

    @override
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total, queries, window = k.size(1), q.size(1), self.window
        if total <= window:
            return self.inner(q, k, v)
        padding_after = -total % window  # positions behind the last one, which nothing attends to
        padding_before = -(queries + padding_after) % window
        groups = q.size(2) // k.size(2)
        q = F.pad(q, (0, 0, 0, 0, padding_before, padding_after))
        blocks = q.size(1) // window  # blocks of positions that are queried, the last ones
        q = q.unflatten(1, (blocks, window)).flatten(0, 1).transpose(1, 2)  # (B * blocks, H, window, d)
        k, v = (
            self._with_block_before(each, padding_after, blocks).repeat_interleave(groups, dim=1) for each in (k, v)
        )
        distance = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
        mask = ((distance >= 0) & (distance < window)).expand(blocks, window, 2 * window)
        if blocks * window == total + padding_after:  # nothing precedes the first block
            mask = torch.cat((mask[:1] & (torch.arange(2 * window, device=q.device) >= window), mask[1:]))
        mask = mask.repeat(len(q) // blocks, 1, 1)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return y.unflatten(0, (-1, blocks)).flatten(1, 2)[:, padding_before : padding_before + queries]

    def _with_block_before(self, x: Tensor, padding_after: int, blocks: int) -> Tensor:
        """Map (B, T, K, d) to (B * blocks, K, 2 * window, d): each of the last blocks behind the one before it."""
        cut = F.pad(x, (0, 0, 0, 0, self.window, padding_after)).unflatten(1, (-1, self.window))[:, -blocks - 1 :]
        return torch.cat((cut[:, :-1], cut[:, 1:]), dim=2).flatten(0, 1).transpose(1, 2)

    @override
    def describe(self) -> str:
        return self.inner.describe()


def with_window(backend: AttentionBackend, window: int) -> AttentionBackend:
    """The same backend with an attention window of at most so many tokens, the position itself included."""
    if isinstance(backend, ByGradient):
        return ByGradient(with_window(backend.training, window), with_window(backend.scoring, window))
    if isinstance(backend, FlashAttention4):
        return replace(backend, window=min(window, backend.window or window))
    if isinstance(backend, WindowedAttention):
        return WindowedAttention(backend.inner, min(window, backend.window))
    return WindowedAttention(backend, window)
