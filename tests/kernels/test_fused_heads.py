"""QK-norm with RoPE, and XSA, as operators, against the formulas of the attention module and torch's derivatives."""

import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trainer.kernels import fused_heads
from trainer.kernels.attention_backends import SdpaBackend
from trainer.model.attention import Attention, AttentionConfig, offset_keys, rotary_tables, rotate, xsa
from trainer.model.layers import EPS

CPU = torch.device("cpu")
# Without a GPU, Triton's interpreter runs the kernels: TRITON_INTERPRET=1, and the package triton.
HERE = torch.device("cuda") if torch.cuda.is_available() else CPU
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.bfloat16]  # it is slow
CAN_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def qk_norm_rope(
    qkv: Tensor,
    tables: Tensor,
    gain: Tensor,
    kv_heads: int,
    eps: float,
    copies: int,
    offset_from: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, as formulas."""
    q, k, v = qkv.split((qkv.size(2) - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    q, k = (rotate(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), tables) for x in (q, k))
    if offset_from is not None:
        k = offset_keys(k, k[:, :1], offset_from)
    return q * gain[:, None], k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)


def qk_norm_rope_backward(q_grad, k_grad, v_grad, qkv, tables, gain, eps, offset_from=None):
    """Its derivative as the kernel computes it: rotated back, without the component along the vector."""
    kv_heads = (qkv.size(2) - q_grad.size(2)) // 2
    k_grad, v_grad = (each.unflatten(2, (kv_heads, -1)).sum(3) for each in (k_grad, v_grad))
    if offset_from is not None:  # what the position after has taken; the first also keeps its own
        taken = torch.arange(k_grad.size(-1), device=k_grad.device) % (k_grad.size(-1) // 2) >= offset_from
        given = torch.cat((k_grad[:, 1:], torch.zeros_like(k_grad[:, :1])), dim=1)
        given[:, 0] += k_grad[:, 0]
        k_grad = torch.where(taken, given, k_grad)
    back = torch.stack((tables[0], -tables[1]))
    grads, gains = [], None
    for x, g in zip(qkv.split((q_grad.size(2), kv_heads, kv_heads), dim=2), (q_grad, k_grad, v_grad), strict=True):
        if g is v_grad:
            grads.append(g)
            continue
        g = rotate(g, back)
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        along = (g * x).sum(-1, keepdim=True) * inverse
        grad = inverse * (g - x * along * inverse / x.size(-1))
        if g.shape == q_grad.shape and gains is None:
            gains, grad = along.sum((0, 1, 3)), grad * gain[:, None]
        grads.append(grad)
    return torch.cat(grads, dim=2), gains


def scaled_xsa(y, v, factor):
    """What the kernel computes, as a formula."""
    return xsa(y, v) if factor is None else xsa(y, v) * factor[..., None]


def xsa_backward(grad, y, v, factor):
    """Its derivative as the kernel computes it."""
    factor_grad = y.new_empty(0) if factor is None else (grad * xsa(y, v)).sum(-1)
    grad = grad if factor is None else grad * factor[..., None]
    group = y.size(2) // v.size(2)
    value = v.repeat_interleave(group, dim=2)
    inverse = 1 / value.square().sum(-1, keepdim=True)
    share, g_share = ((each * value).sum(-1, keepdim=True) * inverse for each in (y, grad))
    v_grad = -share * grad - g_share * (y - 2 * share * value)
    return grad - g_share * value, v_grad.unflatten(2, (-1, group)).sum(3), factor_grad


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(
        qk_norm_rope=qk_norm_rope,
        qk_norm_rope_backward=qk_norm_rope_backward,
        xsa=scaled_xsa,
        xsa_backward=xsa_backward,
    )
    monkeypatch.setitem(sys.modules, fused_heads.TRITON, kernels)


@pytest.mark.usefixtures("formulas")
def test_operators_pass_on_the_right_derivatives():
    torch.manual_seed(0)
    tables = rotary_tables(5, 6, 100.0, CPU, 4).double()
    qkv = torch.randn(2, 5, 8, 6, dtype=torch.float64, requires_grad=True)  # four query heads, two key heads
    gain = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for eps, copies, offset_from in ((EPS, 1, None), (EPS, 2, None), (0.5, 1, None), (EPS, 2, 2)):
        operator = partial(fused_heads.qk_norm_rope, kv_heads=2, eps=eps, copies=copies, offset_from=offset_from)
        assert torch.autograd.gradcheck(lambda x, g, run=operator: run(x, tables, g), (qkv, gain))
    y, v = (torch.randn(2, 5, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    factor = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fused_heads.xsa, (y, v))
    assert torch.autograd.gradcheck(fused_heads.xsa, (y, v, factor))


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("start_pos", [0, 3])
@pytest.mark.parametrize("gate_dims", [None, 12])
@pytest.mark.parametrize("has_key_offset", [False, True])
@pytest.mark.parametrize(("has_value_embedding", "copies_kv"), [(True, True), (False, True), (False, False)])
def test_attention_and_all_its_gradients_are_the_same_with_the_operators(
    start_pos: int, has_value_embedding: bool, copies_kv: bool, has_key_offset: bool, gate_dims: int | None
):
    torch.manual_seed(0)
    config = AttentionConfig(4, 2, rope_dims=4, xsa=True, gate_dims=gate_dims)
    attention = Attention(config, 32, has_value_embedding, has_key_offset).double()
    if attention.gate is not None:
        torch.nn.init.normal_(attention.gate)
    attention.backend = SdpaBackend("math", copies_kv)
    tables = rotary_tables(7, 8, 100.0, CPU, 4).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 7, 2, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(32, dtype=torch.float64, requires_grad=True)
    results = []
    for attention.is_fused in (False, True):
        out = attention(x, tables, scale, start_pos, values)
        inputs = (x, scale, *attention.parameters(), *([values] if has_value_embedding else []))
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not CAN_RUN, reason="the kernels need a GPU or Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotated", "has_key_offset"),
    [(8, 4, 64, None, False), (4, 2, 128, 32, False), (4, 2, 128, 32, True), (6, 1, 16, 4, False), (6, 1, 16, 4, True)],
)
def test_kernels_equal_the_formulas_also_for_lengths_that_no_block_divides(
    dtype, heads, kv_heads, width, rotated, has_key_offset, copies
):
    offset_from = rotated // 2 if has_key_offset else None
    assert fused_heads.runs_on((heads, kv_heads, width), HERE, dtype)
    torch.manual_seed(0)
    tables = rotary_tables(11, width, 10000.0, HERE, rotated)
    qkv = torch.randn(3, 11, heads + 2 * kv_heads, width, device=HERE, dtype=dtype)
    gain = torch.randn(heads, device=HERE)
    q, k, v = fused_heads.qk_norm_rope(qkv, tables, gain, kv_heads, EPS, copies, offset_from)
    exact = qk_norm_rope(qkv.double(), tables.double(), gain.double(), kv_heads, EPS, copies, offset_from)
    for result, expected in zip((q, k, v), exact, strict=True):
        assert is_close(result, expected)
    grads = [torch.randn_like(each) for each in (q, k, v)]
    kernels = sys.modules[fused_heads.TRITON]
    results = kernels.qk_norm_rope_backward(*grads, qkv, tables, gain, EPS, offset_from)
    doubles = [each.double() for each in (*grads, qkv, tables, gain)]
    exact = qk_norm_rope_backward(*doubles, eps=EPS, offset_from=offset_from)
    for result, expected in zip(results, exact, strict=True):
        assert is_close(result, expected)
    v = v[:, :, ::copies].contiguous()
    y, grad = (torch.randn(3, 11, heads, width, device=HERE, dtype=dtype) for _ in range(2))
    for factor in (None, torch.randn(3, 11, heads, device=HERE, dtype=dtype)):
        exact_factor = None if factor is None else factor.double()
        assert is_close(fused_heads.xsa(y, v, factor), scaled_xsa(y.double(), v.double(), exact_factor))
        expected_grads = xsa_backward(grad.double(), y.double(), v.double(), exact_factor)
        for result, expected in zip(kernels.xsa_backward(grad, y, v, factor), expected_grads, strict=True):
            assert result.shape == expected.shape
            assert not expected.numel() or is_close(result, expected)


@pytest.mark.skipif(not CAN_RUN, reason="the kernels need a GPU or Triton's interpreter")
def test_the_kernels_add_the_eps_they_are_given():
    torch.manual_seed(0)
    tables = rotary_tables(3, 16, 10000.0, HERE)
    qkv, gain = torch.randn(1, 3, 4, 16, device=HERE).bfloat16(), torch.ones(2, device=HERE)
    for eps in (EPS, 0.5):
        results = fused_heads.qk_norm_rope(qkv, tables, gain, 1, eps)
        exact = qk_norm_rope(qkv.double(), tables.double(), gain.double(), 1, eps, 1)
        grads = [torch.randn_like(each) for each in results]
        results += sys.modules[fused_heads.TRITON].qk_norm_rope_backward(*grads, qkv, tables, gain, eps, None)
        exact += qk_norm_rope_backward(*[each.double() for each in (*grads, qkv, tables, gain)], eps=eps)
        assert all(is_close(result, expected) for result, expected in zip(results, exact, strict=True))


def is_close(result: Tensor, expected: Tensor) -> bool:
    """Within what rounding to 8 bits of mantissa does."""
    return bool((result.double() - expected).norm() < 6e-3 * expected.norm())


@pytest.mark.usefixtures("formulas")  # which run with any width and type
def test_only_16_bit_types_and_widths_that_are_powers_of_two_are_fused():
    assert fused_heads.runs_on((4, 2, 64), CPU, torch.bfloat16)
    assert not fused_heads.runs_on((4, 2, 96), CPU, torch.bfloat16)
    assert not fused_heads.runs_on((4, 2, 64), CPU, torch.float32)
