"""The operators around the attention kernel, against the formulas of the attention module and torch's derivatives."""

import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trainer.kernels import fused_heads
from trainer.model.attention import Attention, AttentionConfig, rotary_tables, rotate, xsa
from trainer.kernels.attention_backends import SdpaBackend
from trainer.model.layers import EPS

CPU = torch.device("cpu")
# Without a GPU, Triton's interpreter runs the kernels: TRITON_INTERPRET=1, and the package triton.
HERE = torch.device("cuda") if torch.cuda.is_available() else CPU
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.bfloat16]  # it is slow
CAN_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def turn(qkv: Tensor, tables: Tensor, gain: Tensor, kv_heads: int, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, as formulas."""
    q, k, v = qkv.split((qkv.size(2) - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    q, k = (rotate(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS), tables) for x in (q, k))
    return q * gain[:, None], k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)


def turn_backward(q_grad, k_grad, v_grad, qkv, tables, gain):
    """Its derivative as the kernel takes it: turned back, without the part along the vector."""
    kv_heads = (qkv.size(2) - q_grad.size(2)) // 2
    k_grad, v_grad = (each.unflatten(2, (kv_heads, -1)).sum(3) for each in (k_grad, v_grad))
    back = torch.stack((tables[0], -tables[1]))
    grads, gains = [], None
    for x, g in zip(qkv.split((q_grad.size(2), kv_heads, kv_heads), dim=2), (q_grad, k_grad, v_grad), strict=True):
        if g is v_grad:
            grads.append(g)
            continue
        g = rotate(g, back)
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        along = (g * x).sum(-1, keepdim=True) * inverse
        grad = inverse * (g - x * along * inverse / x.size(-1))
        if g.shape == q_grad.shape and gains is None:
            gains, grad = along.sum((0, 1, 3)), grad * gain[:, None]
        grads.append(grad)
    return torch.cat(grads, dim=2), gains


def exclude_backward(grad, y, v):
    """The derivative of `xsa` as the kernel takes it."""
    group = y.size(2) // v.size(2)
    own = v.repeat_interleave(group, dim=2)
    inverse = 1 / own.square().sum(-1, keepdim=True)
    share, g_share = ((each * own).sum(-1, keepdim=True) * inverse for each in (y, grad))
    v_grad = -share * grad - g_share * (y - 2 * share * own)
    return grad - g_share * own, v_grad.unflatten(2, (-1, group)).sum(3)


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(
        turn=turn, turn_backward=turn_backward, exclude=xsa, exclude_backward=exclude_backward
    )
    monkeypatch.setitem(sys.modules, fused_heads.KERNEL, kernel)


@pytest.mark.usefixtures("formulas")
def test_operators_pass_on_the_right_derivatives():
    torch.manual_seed(0)
    tables = rotary_tables(5, 6, 100.0, CPU, 4).double()
    qkv = torch.randn(2, 5, 8, 6, dtype=torch.float64, requires_grad=True)  # four query heads, two key heads
    gain = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for copies in (1, 2):
        operator = partial(fused_heads.qk_norm_rope, kv_heads=2, copies=copies)
        assert torch.autograd.gradcheck(lambda x, g, run=operator: run(x, tables, g), (qkv, gain))
    y, v = (torch.randn(2, 5, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    assert torch.autograd.gradcheck(fused_heads.xsa, (y, v))


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(("has_value_embedding", "expand_kv"), [(True, True), (False, True), (False, False)])
def test_attention_is_the_same_with_them_and_so_are_all_gradients(first: int, has_value_embedding: bool, expand_kv: bool):
    torch.manual_seed(0)
    attention = Attention(AttentionConfig(4, 2, rope_dims=4, xsa=True), 32, has_value_embedding).double()
    attention.kernel = SdpaBackend("math", expand_kv)
    tables = rotary_tables(7, 8, 100.0, CPU, 4).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 7, 2, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(32, dtype=torch.float64, requires_grad=True)
    found = []
    for attention.is_fused in (False, True):
        out = attention(x, tables, scale, first, values)
        inputs = (x, scale, *attention.parameters(), *([values] if has_value_embedding else []))
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not CAN_RUN, reason="the kernels need a GPU or Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "turning"), [(8, 4, 64, None), (4, 2, 128, 32), (6, 1, 16, 4)])
def test_kernels_equal_the_formulas_also_for_lengths_that_no_block_divides(
    dtype, heads, kv_heads, width, turning, copies
):
    assert fused_heads.runs_on((heads, kv_heads, width), HERE, dtype)
    torch.manual_seed(0)
    tables = rotary_tables(11, width, 10000.0, HERE, turning)
    qkv = torch.randn(3, 11, heads + 2 * kv_heads, width, device=HERE, dtype=dtype)
    gain = torch.randn(heads, device=HERE)
    q, k, v = fused_heads.qk_norm_rope(qkv, tables, gain, kv_heads, copies)
    exact = turn(qkv.double(), tables.double(), gain.double(), kv_heads, copies)
    for found, expected in zip((q, k, v), exact, strict=True):
        assert close(found, expected)
    grads = [torch.randn_like(each) for each in (q, k, v)]
    kernel = sys.modules[fused_heads.KERNEL]
    found = kernel.turn_backward(*grads, qkv, tables, gain)
    doubles = [each.double() for each in (*grads, qkv, tables, gain)]
    for each, expected in zip(found, turn_backward(*doubles), strict=True):
        assert close(each, expected)
    v = v[:, :, ::copies].contiguous()
    y, grad = (torch.randn(3, 11, heads, width, device=HERE, dtype=dtype) for _ in range(2))
    assert close(fused_heads.xsa(y, v), xsa(y.double(), v.double()))
    expected_grads = exclude_backward(grad.double(), y.double(), v.double())
    for each, expected in zip(kernel.exclude_backward(grad, y, v), expected_grads, strict=True):
        assert close(each, expected)


def close(found: Tensor, expected: Tensor) -> bool:
    """Within what rounding to 8 bits of mantissa does."""
    return bool((found.double() - expected).norm() < 6e-3 * expected.norm())


@pytest.mark.usefixtures("formulas")  # which run with any
def test_widths_that_are_no_power_of_two_and_other_types_follow_the_formulas():
    assert fused_heads.runs_on((4, 2, 64), CPU, torch.bfloat16)
    assert not fused_heads.runs_on((4, 2, 96), CPU, torch.bfloat16)
    assert not fused_heads.runs_on((4, 2, 64), CPU, torch.float32)
