"""The band equals masked attention in numpy, at lengths that it divides and at others."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.model.attention_kernel import SdpaKernel
from trainer.model.banded_attention import BandedAttention


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_each_position_attends_to_the_last_so_many(total: int, band: int, data: st.DataObject):
    scored = data.draw(st.integers(1, total))
    generator = torch.Generator().manual_seed(total * 100 + band)
    q = torch.randn(2, scored, 4, 8, generator=generator).double()
    k, v = torch.randn(2, 2, total, 2, 8, generator=generator).double()
    found = BandedAttention(SdpaKernel(), band)(q, k, v).numpy()
    if total <= band:
        return  # the kernel inside, which has its own test
    for batch in range(2):
        for head in range(4):
            for row in range(scored):
                at = total - scored + row
                seen = slice(max(0, at - band + 1), at + 1)
                scores = k[batch, seen, head // 2].numpy() @ q[batch, row, head].numpy() / np.sqrt(8)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[batch, seen, head // 2].numpy()
                assert np.allclose(found[batch, row, head], expected)
