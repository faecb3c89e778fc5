"""The Triton kernel of `fused_mlp`: one matrix product whose results are squared, or multiplied by a derivative.

A leaky unit keeps the sign of what it squared in the last bit of the 16-bit square, so that the backward pass needs to
read nothing more; that bit of the value is lost.

A fixed number of programs, one a multiprocessor, walk over the tiles, so that a tile's stores overlap the next tile's
loads; tiles come and go through the tensor memory accelerator. Its sizes are the fastest found on an H200.
"""

# ruff: noqa: ANN001, ANN202 - Triton reads the signature of a kernel itself

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile
STAGES, WARPS = 3, 8
LARGEST = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}  # bits of the largest finite number


@triton.jit
def _kernel(
    a_tiles,
    b_tiles,
    squared_tiles,
    out_tiles,
    m,
    n,
    k,
    slope: tl.constexpr,
    largest: tl.constexpr,
    backward: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    programs: tl.constexpr,
):
    half: tl.constexpr = columns // 2
    across = tl.cdiv(n, columns)
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, rows) * across, programs, flatten=True):
        row, column = tile // across * rows, tile % across * columns
        total = tl.zeros((rows, columns), dtype=tl.float32)
        for step in range(tl.cdiv(k, depth)):
            a = a_tiles.load([row, step * depth])
            b = b_tiles.load([column, step * depth])
            total = tl.dot(a, b.T, total)
        if backward:  # both at once, before the arithmetic waits for either
            left_y = squared_tiles.load([row, column])
            right_y = squared_tiles.load([row, column + half])
        # In two halves, which need half the shared memory.
        left, right = tl.split(tl.permute(tl.reshape(total, (rows, 2, half)), (0, 2, 1)))
        for index in tl.static_range(2):
            part = left if index == 0 else right
            place = column + index * half
            if backward:
                y = left_y if index == 0 else right_y
                part *= 2 * tl.sqrt(y.to(tl.float32))
                if slope != 0:
                    part = tl.where((y.to(tl.int16, bitcast=True) & 1) == 1, -slope * part, part)
                result = part.to(out_tiles.dtype)
            elif slope == 0:
                part = tl.maximum(part, 0.0)
                result = (part * part).to(out_tiles.dtype)
            else:
                leaky = tl.where(part < 0, slope * part, part)
                result = (leaky * leaky).to(out_tiles.dtype)
                bits = result.to(tl.int16, bitcast=True)
                negative = (part < 0).to(tl.int16)
                # A last bit that is wrong goes up or down by the bit before it: as often the one as the other.
                signed = bits + ((bits ^ negative) & 1) * ((bits & 2) - 1)
                # Zero has no sign to keep, and what is not finite must stay so.
                bits = tl.where((bits > 0) & (bits < largest), signed, bits)
                result = bits.to(out_tiles.dtype, bitcast=True)
            out_tiles.store([row, place], result)


def product(a: Tensor, b: Tensor, squared: Tensor | None, slope: float = 0.0) -> Tensor:
    """leaky_relu(a b^T)^2, or a b^T times the derivative of the square, 2 sqrt(squared) or -2 slope sqrt(squared).

    Args:
        a: (M, K), 16-bit, contiguous; K a multiple of 8.
        b: (N, K) of the same type, contiguous.
        squared: (M, N) of the same type, contiguous, or None.
        slope: Of the unit below zero, not negative.

    Returns:
        (M, N) of the same type; with a slope, squares of negative units have an odd last bit, all others an even one.
    """
    (m, k), n = a.shape, b.size(0)
    out = a.new_empty(m, n)
    half = [ROWS, COLUMNS // 2]
    out_tiles = TensorDescriptor.from_tensor(out, half)
    programs = min(
        torch.cuda.get_device_properties(a.device).multi_processor_count,
        triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS),
    )
    _kernel[programs,](
        TensorDescriptor.from_tensor(a, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(b, [COLUMNS, DEPTH]),
        out_tiles if squared is None else TensorDescriptor.from_tensor(squared, half),
        out_tiles,
        m,
        n,
        k,
        slope=slope,
        largest=LARGEST[a.dtype],
        backward=squared is not None,
        rows=ROWS,
        columns=COLUMNS,
        depth=DEPTH,
        programs=programs,
        num_stages=STAGES,
        num_warps=WARPS,
    )
    return out
