"""Attention that looks back a fixed number of tokens (sliding-window attention, Beltagy et al. 2020).

flash-attn-4 does it itself and is faster for it. Around any other kernel, each block of positions attends to itself and
to the block before, with a mask: no faster than looking at everything, unless the text is long.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.attention_kernel import AttentionKernel, ByGradient, FlashAttention4


@dataclass(frozen=True)
class BandedAttention:
    """Another kernel for sequences up to the band, and the band beyond.

    Attributes:
        inner: The kernel for sequences that are not longer than the band.
        band: Tokens that a position looks back at, itself included.
    """

    inner: AttentionKernel
    band: int
    copies_kv: ClassVar[bool] = False  # it does so itself, block by block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionKernel."""
        total, scored, band = k.size(1), q.size(1), self.band
        if total <= band:
            return self.inner(q, k, v)
        behind = -total % band  # positions behind the last, which none looks at
        before = -(scored + behind) % band
        groups = q.size(2) // k.size(2)
        q = F.pad(q, (0, 0, 0, 0, before, behind))
        asked = q.size(1) // band  # the last so many blocks
        q = q.unflatten(1, (asked, band)).flatten(0, 1).transpose(1, 2)  # (B * asked, H, band, d)
        k, v = (self._with_block_before(each, behind, asked).repeat_interleave(groups, dim=1) for each in (k, v))
        back = torch.arange(band, device=q.device)[:, None] + band - torch.arange(2 * band, device=q.device)
        mask = ((back >= 0) & (back < band)).expand(asked, band, 2 * band)
        if asked * band == total + behind:  # nothing lies before the first block
            mask = torch.cat((mask[:1] & (torch.arange(2 * band, device=q.device) >= band), mask[1:]))
        mask = mask.repeat(len(q) // asked, 1, 1)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return y.unflatten(0, (-1, asked)).flatten(1, 2)[:, before : before + scored]

    def _with_block_before(self, x: Tensor, behind: int, asked: int) -> Tensor:
        """Map (B, T, K, d) to (B * asked, K, 2 * band, d): each of the last blocks behind the one before it."""
        blocks = F.pad(x, (0, 0, 0, 0, self.band, behind)).unflatten(1, (-1, self.band))[:, -asked - 1 :]
        return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2).flatten(0, 1).transpose(1, 2)

    def describe(self) -> str:
        """See AttentionKernel."""
        return self.inner.describe()


def with_window(kernel: AttentionKernel, window: int) -> AttentionKernel:
    """The same kernel, looking back at so many tokens at most, the position itself included."""
    if isinstance(kernel, ByGradient):
        return ByGradient(with_window(kernel.training, window), with_window(kernel.scoring, window))
    if isinstance(kernel, FlashAttention4):
        return replace(kernel, window=min(window, kernel.window or window))
    if isinstance(kernel, BandedAttention):
        return BandedAttention(kernel.inner, min(window, kernel.band))
    return BandedAttention(kernel, window)
