"""The Triton kernel of `fused_mlp`: one matrix product whose results are squared, or multiplied by a derivative.

A fixed number of programs, one per multiprocessor, loop over the tiles, so that a tile's stores overlap the next tile's
loads. The tensor memory accelerator moves the tiles. Their sizes are the fastest found on an H200.
"""

# ruff: noqa: ANN001, ANN202 - Triton reads the signature of a kernel itself

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile
STAGES, WARPS = 3, 8


@triton.jit
def _kernel(
    a_tiles,
    b_tiles,
    squared_tiles,
    out_tiles,
    m,
    n,
    k,
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
            if backward:
                y = left_y if index == 0 else right_y
                part *= 2 * tl.sqrt(y.to(tl.float32))
            else:
                part = tl.maximum(part, 0.0)
                part = part * part
            out_tiles.store([row, column + index * half], part.to(out_tiles.dtype))


def product(a: Tensor, b: Tensor, squared: Tensor | None) -> Tensor:
    """relu(a b^T)^2, or a b^T times the derivative of the square, 2 sqrt(squared).

    Args:
        a: (M, K), 16-bit, contiguous; K a multiple of 8.
        b: (N, K) of the same type, contiguous.
        squared: (M, N) of the same type, contiguous, or None.

    Returns:
        (M, N) of the same type.
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
        backward=squared is not None,
        rows=ROWS,
        columns=COLUMNS,
        depth=DEPTH,
        programs=programs,
        num_stages=STAGES,
        num_warps=WARPS,
    )
    return out
