"""Attention with a window equals masked attention in numpy, at lengths that the window divides and at others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.kernels.attention_backends import FlashAttention4, SdpaBackend
from trainer.kernels.windowed_attention import WindowedAttention, with_window
from trainer.model.attention import AttentionConfig
from trainer.model.config import TransformerConfig
from trainer.model.kernel_choice import time_attention


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_each_position_attends_to_the_tokens_of_its_window(total: int, window: int, data: st.DataObject):
    queries = data.draw(st.integers(1, total))
    generator = torch.Generator().manual_seed(total * 100 + window)
    q = torch.randn(2, queries, 4, 8, generator=generator).double()
    k, v = torch.randn(2, 2, total, 2, 8, generator=generator).double()
    y = WindowedAttention(SdpaBackend(), window)(q, k, v).numpy()
    if total <= window:
        return  # the inner backend, which has its own test
    for batch in range(2):
        for head in range(4):
            for row in range(queries):
                position = total - queries + row
                seen = slice(max(0, position - window + 1), position + 1)
                scores = k[batch, seen, head // 2].numpy() @ q[batch, row, head].numpy() / np.sqrt(8)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[batch, seen, head // 2].numpy()
                assert np.allclose(y[batch, row, head], expected)


def test_the_smaller_of_two_windows_counts():
    inner = SdpaBackend()
    assert with_window(with_window(inner, 8), 5) == with_window(with_window(inner, 5), 8) == WindowedAttention(inner, 5)
    assert with_window(FlashAttention4(), 5) == with_window(FlashAttention4(5), 8) == FlashAttention4(5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-attn-4 needs a GPU")
@pytest.mark.parametrize("queries", [300, 64])
def test_flash_attention_with_a_window_equals_windowed_attention(queries: int):
    device = torch.device("cuda")
    config = TransformerConfig(model_dim=256, attention=AttentionConfig(4, 2))
    if time_attention(FlashAttention4(100), False, False, config, 256, device, torch.bfloat16, False) is None:
        pytest.skip("needs flash-attn-4 and a GPU that it runs on")
    torch.manual_seed(0)
    q = torch.randn(2, queries, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(2, 300, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)
    y = FlashAttention4(100)(q, k, v)
    inputs = [each.detach().double().requires_grad_() for each in (q, k, v)]
    expected = WindowedAttention(SdpaBackend("math"), 100)(*inputs)
    pairs = [(y, expected)]
    if queries == 300:  # a training step has a query at every position
        pairs += zip(
            torch.autograd.grad(y, (q, k, v), grad),
            torch.autograd.grad(expected, inputs, grad.double()),
            strict=True,
        )
    for result, exact in pairs:
        assert (result.double() - exact).norm() / exact.norm() < 1e-2
