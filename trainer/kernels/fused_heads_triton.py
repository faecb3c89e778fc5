"""The Triton kernels of `fused_heads`: each reads and writes every number once.

A program has a few positions and loops over their heads, so that the tables of angles and the values are loaded once.
All arithmetic is in float32.
"""

# ruff: noqa: ANN001, ANN202 - Triton reads the signature of a kernel itself

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 4, 2  # positions of a program; from 2 to 32 of them differ by less than 20 %
MIN_SQUARE = 1e-24  # lower bound of a value's squared length: F.normalize divides by no less than 1e-12


@triton.jit
def _qk_norm_rope(
    qkv,
    tables,
    gain,
    q,
    k,
    v,
    positions,
    length,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    copies: tl.constexpr,
    half: tl.constexpr,
    offset_from: tl.constexpr,
    rows: tl.constexpr,
    eps: tl.constexpr,
):
    width: tl.constexpr = 2 * half
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    column = tl.arange(0, half)[None, :]
    inside = row < positions
    angle = tables + row % length * width + column
    cos = tl.load(angle, inside, 0.0)
    sin = tl.load(angle + length * width, inside, 0.0)
    for head in tl.static_range(heads + 2 * kv_heads):
        source = qkv + (row * (heads + 2 * kv_heads) + head) * width + column
        a = tl.load(source, inside, 0.0)
        b = tl.load(source + half, inside, 0.0)
        if head < heads + kv_heads:
            a, b = a.to(tl.float32), b.to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / width + eps)
            if head < heads:
                scale *= tl.load(gain + head)
            a, b = (a * cos + b * sin) * scale, (b * cos - a * sin) * scale
            if head >= heads and offset_from < half:
                before = source - tl.where(row % length > 0, (heads + 2 * kv_heads) * width, 0)
                c = tl.load(before, inside, 0.0).to(tl.float32)
                d = tl.load(before + half, inside, 0.0).to(tl.float32)
                scale = tl.rsqrt((tl.sum(c * c, 1) + tl.sum(d * d, 1))[:, None] / width + eps)
                is_taken = column >= offset_from  # RoPE does not rotate them
                a, b = tl.where(is_taken, c * scale, a), tl.where(is_taken, d * scale, b)
        a, b = a.to(q.dtype.element_ty), b.to(q.dtype.element_ty)
        if head < heads:
            out = q + (row * heads + head) * width + column
            tl.store(out, a, inside)
            tl.store(out + half, b, inside)
        else:
            offset = (row * kv_heads + (head - heads) % kv_heads) * copies * width + column
            for copy in tl.static_range(copies):
                out = (k if head < heads + kv_heads else v) + offset + copy * width
                tl.store(out, a, inside)
                tl.store(out + half, b, inside)


@triton.jit
def _qk_norm_rope_backward(
    q_grad,
    k_grad,
    v_grad,
    qkv,
    tables,
    gain,
    qkv_grad,
    gain_grads,
    positions,
    length,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    copies: tl.constexpr,
    half: tl.constexpr,
    offset_from: tl.constexpr,
    rows: tl.constexpr,
    eps: tl.constexpr,
):
    width: tl.constexpr = 2 * half
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    column = tl.arange(0, half)[None, :]
    inside = row < positions
    angle = tables + row % length * width + column
    cos = tl.load(angle, inside, 0.0)
    sin = tl.load(angle + length * width, inside, 0.0)
    for head in tl.static_range(heads + 2 * kv_heads):
        if head < heads:
            grad = q_grad + (row * heads + head) * width + column
            da = tl.load(grad, inside, 0.0).to(tl.float32)
            db = tl.load(grad + half, inside, 0.0).to(tl.float32)
        else:
            grad = (k_grad if head < heads + kv_heads else v_grad) + column
            grad += (row * kv_heads + (head - heads) % kv_heads) * copies * width
            da = tl.load(grad, inside, 0.0).to(tl.float32)
            db = tl.load(grad + half, inside, 0.0).to(tl.float32)
            for copy in tl.static_range(1, copies):
                da += tl.load(grad + copy * width, inside, 0.0).to(tl.float32)
                db += tl.load(grad + copy * width + half, inside, 0.0).to(tl.float32)
            if head < heads + kv_heads and offset_from < half:
                # The first position keeps its own channels, and all but the last also serve the position after.
                is_taken = column >= offset_from
                da = tl.where(is_taken & (row % length > 0), 0.0, da)
                db = tl.where(is_taken & (row % length > 0), 0.0, db)
                is_used = inside & is_taken & (row % length < length - 1)
                for copy in tl.static_range(copies):
                    after = grad + (kv_heads * copies + copy) * width
                    da += tl.load(after, is_used, 0.0).to(tl.float32)
                    db += tl.load(after + half, is_used, 0.0).to(tl.float32)
        offset = (row * (heads + 2 * kv_heads) + head) * width + column
        if head < heads + kv_heads:
            da, db = da * cos - db * sin, da * sin + db * cos  # rotated back
            a = tl.load(qkv + offset, inside, 0.0).to(tl.float32)
            b = tl.load(qkv + offset + half, inside, 0.0).to(tl.float32)
            inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / width + eps)
            along = (tl.sum(da * a, 1) + tl.sum(db * b, 1))[:, None] * inverse
            if head < heads:
                tl.store(gain_grads + tl.program_id(0) * heads + head, tl.sum(along))
                scale = inverse * tl.load(gain + head)
            else:
                scale = inverse
            share = along * inverse / width
            da, db = (da - a * share) * scale, (db - b * share) * scale
        tl.store(qkv_grad + offset, da.to(qkv_grad.dtype.element_ty), inside)
        tl.store(qkv_grad + offset + half, db.to(qkv_grad.dtype.element_ty), inside)


@triton.jit
def _xsa(
    y,
    v,
    factor,
    out,
    positions,
    has_factor: tl.constexpr,
    group: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    min_square: tl.constexpr,
):
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    column = tl.arange(0, width)[None, :]
    inside = row < positions
    for kv_head in tl.static_range(kv_heads):
        value = tl.load(v + (row * kv_heads + kv_head) * width + column, inside, 0.0).to(tl.float32)
        inverse = 1 / tl.maximum(tl.sum(value * value, 1)[:, None], min_square)
        for member in tl.static_range(group):
            offset = ((row * kv_heads + kv_head) * group + member) * width + column
            head = tl.load(y + offset, inside, 0.0).to(tl.float32)
            head -= tl.sum(head * value, 1)[:, None] * inverse * value
            if has_factor:
                head *= tl.load(factor + (row * kv_heads + kv_head) * group + member, inside, 0.0).to(tl.float32)
            tl.store(out + offset, head.to(out.dtype.element_ty), inside)


@triton.jit
def _xsa_backward(
    grad,
    y,
    v,
    factor,
    y_grad,
    v_grad,
    factor_grad,
    positions,
    has_factor: tl.constexpr,
    group: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    min_square: tl.constexpr,
):
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    column = tl.arange(0, width)[None, :]
    inside = row < positions
    for kv_head in tl.static_range(kv_heads):
        value_offset = (row * kv_heads + kv_head) * width + column
        value = tl.load(v + value_offset, inside, 0.0).to(tl.float32)
        inverse = 1 / tl.maximum(tl.sum(value * value, 1)[:, None], min_square)
        total = tl.zeros((rows, width), tl.float32)
        for member in tl.static_range(group):
            offset = ((row * kv_heads + kv_head) * group + member) * width + column
            head = tl.load(y + offset, inside, 0.0).to(tl.float32)
            g = tl.load(grad + offset, inside, 0.0).to(tl.float32)
            share = tl.sum(head * value, 1)[:, None] * inverse
            if has_factor:
                place = (row * kv_heads + kv_head) * group + member
                sum_of_products = tl.sum(g * (head - share * value), 1)[:, None]
                tl.store(factor_grad + place, sum_of_products.to(factor_grad.dtype.element_ty), inside)
                g *= tl.load(factor + place, inside, 0.0).to(tl.float32)
            g_share = tl.sum(g * value, 1)[:, None] * inverse
            tl.store(y_grad + offset, (g - g_share * value).to(y_grad.dtype.element_ty), inside)
            total -= share * g + g_share * (head - 2 * share * value)
        tl.store(v_grad + value_offset, total.to(v_grad.dtype.element_ty), inside)


def qk_norm_rope(
    qkv: Tensor, tables: Tensor, gain: Tensor, kv_heads: int, eps: float, copies: int, offset_from: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `fused_heads.qk_norm_rope` on contiguous tensors."""
    batch, length, every, width = qkv.shape
    heads = every - 2 * kv_heads
    q = qkv.new_empty(batch, length, heads, width)
    k, v = (qkv.new_empty(batch, length, kv_heads * copies, width) for _ in range(2))
    programs = triton.cdiv(batch * length, ROWS)
    sizes = _sizes(heads, kv_heads, copies, width, offset_from, eps)
    _qk_norm_rope[programs,](qkv, tables, gain, q, k, v, batch * length, length, **sizes, num_warps=WARPS)
    return q, k, v


def qk_norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    qkv: Tensor,
    tables: Tensor,
    gain: Tensor,
    eps: float,
    offset_from: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv` and `gain`; all tensors contiguous."""
    batch, length, heads, width = q_grad.shape
    programs = triton.cdiv(batch * length, ROWS)
    qkv_grad = torch.empty_like(qkv)
    gain_grads = gain.new_empty(programs, heads, dtype=torch.float32)
    kv_heads = (qkv.size(2) - heads) // 2
    copies = k_grad.size(2) // kv_heads
    sizes = _sizes(heads, kv_heads, copies, width, offset_from, eps)
    _qk_norm_rope_backward[programs,](
        *(q_grad, k_grad, v_grad, qkv, tables, gain, qkv_grad, gain_grads, batch * length, length),
        **sizes,
        num_warps=WARPS,
    )
    return qkv_grad, gain_grads.sum(0).to(gain.dtype)


def _sizes(
    heads: int, kv_heads: int, copies: int, width: int, offset_from: int | None, eps: float
) -> dict[str, int | float]:
    half = width // 2
    sizes = {"heads": heads, "kv_heads": kv_heads, "copies": copies, "half": half, "rows": ROWS, "eps": eps}
    return sizes | {"offset_from": half if offset_from is None else offset_from}


def xsa(y: Tensor, v: Tensor, factor: Tensor | None) -> Tensor:
    """The operator `fused_heads.xsa` on contiguous tensors."""
    out = torch.empty_like(y)
    _launch(_xsa, (y, v, v if factor is None else factor, out), y, v, factor is not None)
    return out


def xsa_backward(grad: Tensor, y: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `y`, `v` and, unless it is None, `factor`; all contiguous."""
    y_grad, v_grad = torch.empty_like(y), torch.empty_like(v)
    factor_grad = y.new_empty(0) if factor is None else torch.empty_like(factor)
    tensors = grad, y, v, v if factor is None else factor, y_grad, v_grad, factor_grad
    _launch(_xsa_backward, tensors, y, v, factor is not None)
    return y_grad, v_grad, factor_grad


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], y: Tensor, v: Tensor, has_factor: bool) -> None:
    batch, length, heads, width = y.shape
    kv_heads = v.size(2)
    sizes = {"group": heads // kv_heads, "kv_heads": kv_heads, "width": width, "rows": ROWS, "min_square": MIN_SQUARE}
    programs = triton.cdiv(batch * length, ROWS)
    kernel[programs,](*tensors, batch * length, has_factor, **sizes, num_warps=WARPS)
