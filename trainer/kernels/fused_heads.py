"""QK-norm with RoPE and key offset, and XSA with gates, each as one operator that reads and writes every number once.

Compiled from the formulas of `model.attention`, a `frontier` step spends 5.8 ms of an H100 on QK-norm, RoPE and gain,
and as much on XSA; moving their bytes takes 3.8 and 3.2 ms. Needs Triton.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

TRITON = "trainer.kernels.fused_heads_triton"  # its import needs Triton
PROBE_EPS = 1e-6


def is_supported(width: int, dtype: torch.dtype) -> bool:
    """Whether they may run: they need 16-bit numbers and a head width that is a power of two."""
    return not width & (width - 1) and dtype in (torch.bfloat16, torch.float16)


def runs_on(heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """Try both operators forward and backward, with a key offset and without; besides, they need Triton."""
    queries, keys, width = heads
    if not is_supported(width, dtype):
        return False
    try:
        qkv = torch.randn(1, 4, queries + 2 * keys, width, device=device, dtype=dtype).requires_grad_()
        tables = torch.ones(2, 4, width, device=device)
        gain = torch.ones(queries, device=device).requires_grad_()
        for offset_from in (None, width // 4):
            q, k, v = qk_norm_rope(qkv, tables, gain, keys, PROBE_EPS, offset_from=offset_from)
            (xsa(q, v, q[..., 0]).sum() + k.sum()).backward()
    except Exception:  # no Triton, another version of it, no compiler: they cannot be used
        return False
    return qkv.grad is not None and bool(qkv.grad.isfinite().all())


@torch.library.custom_op("golf_trainer::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    qkv: Tensor,
    tables: Tensor,
    gain: Tensor,
    kv_heads: int,
    eps: float,
    copies: int = 1,
    offset_from: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split heads, apply QK-norm and RoPE to queries and keys, scale the queries, and offset the keys.

    Args:
        qkv: (B, T, H + 2 K, d), 16-bit.
        tables: (2, T, d) of `rotary_tables`.
        gain: (H,) factor of each query head.
        kv_heads: K, the number of key and value heads.
        eps: Added to the mean square before its root is taken.
        copies: How often each key and value head is written, one copy after the other.
        offset_from: As of `model.attention.offset_keys`, behind the pairs that RoPE rotates; None: none are taken.

    Returns:
        Queries (B, T, H, d), keys and values (B, T, K copies, d).
    """
    return import_module(TRITON).qk_norm_rope(
        qkv.contiguous(), tables.contiguous(), gain, kv_heads, eps, copies, offset_from
    )


@qk_norm_rope.register_fake
def _(
    qkv: Tensor,
    tables: Tensor,
    gain: Tensor,
    kv_heads: int,
    eps: float,
    copies: int = 1,
    offset_from: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, every, width = qkv.shape
    heads = every - 2 * kv_heads, kv_heads * copies, kv_heads * copies
    q, k, v = (qkv.new_empty(batch, length, count, width) for count in heads)
    return q, k, v


@torch.library.custom_op("golf_trainer::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    qkv: Tensor,
    tables: Tensor,
    gain: Tensor,
    eps: float,
    offset_from: int | None,
) -> tuple[Tensor, Tensor]:
    return import_module(TRITON).qk_norm_rope_backward(q_grad, k_grad, v_grad, qkv, tables, gain, eps, offset_from)


@_qk_norm_rope_backward.register_fake
def _(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    qkv: Tensor,
    tables: Tensor,
    gain: Tensor,
    eps: float,
    offset_from: int | None,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), gain.new_empty(gain.shape)


def _save_heads(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, float, int, int | None], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps, ctx.offset_from = inputs[4], inputs[6]


def _differentiate_heads(
    ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor
) -> tuple[Tensor, None, Tensor, None, None, None, None]:
    qkv, tables, gain = ctx.saved_tensors
    grads = q_grad.contiguous(), k_grad.contiguous(), v_grad.contiguous()
    qkv_grad, gain_grad = _qk_norm_rope_backward(
        *grads, qkv.contiguous(), tables.contiguous(), gain, ctx.eps, ctx.offset_from
    )
    return qkv_grad, None, gain_grad, None, None, None, None


qk_norm_rope.register_autograd(_differentiate_heads, setup_context=_save_heads)


@torch.library.custom_op("golf_trainer::xsa", mutates_args=())
def xsa(y: Tensor, v: Tensor, factor: Tensor | None = None) -> Tensor:
    """As `model.attention.xsa`, each head then multiplied by a factor.

    Args:
        y: (B, T, H, d), 16-bit.
        v: (B, T, K, d) of the same type.
        factor: (B, T, H); None: one.

    Returns:
        (B, T, H, d).
    """
    factor = None if factor is None else factor.contiguous()
    return import_module(TRITON).xsa(y.contiguous(), v.contiguous(), factor)


@xsa.register_fake
def _(y: Tensor, v: Tensor, factor: Tensor | None = None) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("golf_trainer::xsa_backward", mutates_args=())
def _xsa_backward(grad: Tensor, y: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return import_module(TRITON).xsa_backward(grad, y, v, factor)


@_xsa_backward.register_fake
def _(grad: Tensor, y: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        y.new_empty(y.shape),
        v.new_empty(v.shape),
        y.new_empty(0) if factor is None else factor.new_empty(factor.shape),
    )


def _save_values(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_values(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    y, v, factor = ctx.saved_tensors
    contiguous = None if factor is None else factor.contiguous()
    y_grad, v_grad, factor_grad = _xsa_backward(grad.contiguous(), y.contiguous(), v.contiguous(), contiguous)
    return y_grad, v_grad, None if factor is None else factor_grad


xsa.register_autograd(_differentiate_values, setup_context=_save_values)
