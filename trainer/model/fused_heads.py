"""What happens to heads around the attention kernel, each as one operator that reads and writes every number once.

Compiled from the formulas of `attention`, a `frontier` step takes 5.8 ms of an H100 for normalising, turning and
scaling queries and keys, and as much for taking out own values; their bytes take 3.8 and 3.2. Needs Triton.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

KERNEL = "trainer.model.fused_heads_kernel"  # its import needs Triton


def runs_on(heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """Try both operators forward and backward: they need Triton, 16-bit numbers and a width that is a power of two."""
    queries, keys, width = heads
    if width & (width - 1) or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        qkv = torch.randn(1, 4, queries + 2 * keys, width, device=device, dtype=dtype).requires_grad_()
        tables = torch.ones(2, 4, width, device=device)
        gain = torch.ones(queries, device=device).requires_grad_()
        q, k, v = turned_heads(qkv, tables, gain, keys)
        (without_own_value(q, v).sum() + k.sum()).backward()
    except Exception:  # no Triton, another version of it, no compiler: they cannot be used
        return False
    return qkv.grad is not None and bool(qkv.grad.isfinite().all())


@torch.library.custom_op("golf_trainer::turned_heads", mutates_args=())
def turned_heads(
    qkv: Tensor, tables: Tensor, gain: Tensor, kv_heads: int, copies: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Split heads; normalise queries and keys, turn them by their positions, and scale the queries.

    Args:
        qkv: (B, T, H + 2 K, d), 16-bit.
        tables: (2, T, d) of `rotary_tables`.
        gain: (H,) factor of each query head.
        kv_heads: K.
        copies: Of every key and value head, one after the other.

    Returns:
        Queries (B, T, H, d), keys and values (B, T, K copies, d).
    """
    return import_module(KERNEL).turn(qkv.contiguous(), tables.contiguous(), gain, kv_heads, copies)


@turned_heads.register_fake
def _(qkv: Tensor, tables: Tensor, gain: Tensor, kv_heads: int, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, every, width = qkv.shape
    heads = every - 2 * kv_heads, kv_heads * copies, kv_heads * copies
    q, k, v = (qkv.new_empty(batch, length, count, width) for count in heads)
    return q, k, v


@torch.library.custom_op("golf_trainer::turned_heads_backward", mutates_args=())
def _turned_heads_backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, qkv: Tensor, tables: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    return import_module(KERNEL).turn_backward(q_grad, k_grad, v_grad, qkv, tables, gain)


@_turned_heads_backward.register_fake
def _(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, qkv: Tensor, tables: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), gain.new_empty(gain.shape)


def _save_heads(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_heads(
    ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor
) -> tuple[Tensor, None, Tensor, None, None]:
    qkv, tables, gain = ctx.saved_tensors
    grads = q_grad.contiguous(), k_grad.contiguous(), v_grad.contiguous()
    qkv_grad, gain_grad = _turned_heads_backward(*grads, qkv.contiguous(), tables.contiguous(), gain)
    return qkv_grad, None, gain_grad, None, None


turned_heads.register_autograd(_differentiate_heads, setup_context=_save_heads)


@torch.library.custom_op("golf_trainer::without_own_value", mutates_args=())
def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """As `attention.without_own_value`: (B, T, H, d) and (B, T, K, d) to (B, T, H, d), 16-bit."""
    return import_module(KERNEL).exclude(y.contiguous(), v.contiguous())


@without_own_value.register_fake
def _(y: Tensor, v: Tensor) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("golf_trainer::without_own_value_backward", mutates_args=())
def _without_own_value_backward(grad: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return import_module(KERNEL).exclude_backward(grad, y, v)


@_without_own_value_backward.register_fake
def _(grad: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), v.new_empty(v.shape)


def _save_values(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_values(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    y, v = ctx.saved_tensors
    return _without_own_value_backward(grad.contiguous(), y.contiguous(), v.contiguous())


without_own_value.register_autograd(_differentiate_values, setup_context=_save_values)
