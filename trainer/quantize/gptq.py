"""Rounding that lets the columns still to come make up for the error of those before.

Source: GPTQ (Frantar et al. 2023), with its activation order; the Cholesky form of optimal brain surgery.
"""

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of the Hessian's diagonal
BLOCK = 64  # columns whose error reaches the others at once


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Order the columns by what they matter, and factor the inverse of the Hessian in that order.

    Args:
        hessian: (..., C, C), positive semi-definite.

    Returns:
        (..., C) columns, the one with the largest diagonal first, and the upper triangular U, (..., C, C), of the
        damped Hessian's inverse U^T U. 1 / U_jj^2 is what an error in column j costs after the columns behind it have
        made up for what they can.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    damped = hessian.double() + DAMPING * torch.diag_embed(diagonal.mean(-1, keepdim=True).expand_as(diagonal)).double()
    rows = order[..., :, None].expand_as(damped)
    ordered = damped.gather(-2, rows).gather(-1, rows.mT)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return order, torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


def round_with_feedback(weight: Tensor, steps: Tensor, limit: int, order: Tensor, factor: Tensor) -> Tensor:
    """Round to multiples of a step.

    Args:
        weight: (..., R, C) float.
        steps: (..., R, C) or broadcastable, the distance of neighbours.
        limit: Symbols lie between -limit and limit.
        order: (..., C) of `inverse_factor`.
        factor: (..., C, C) of `inverse_factor`.

    Returns:
        (..., R, C) int8 symbols, in the order of the weight's columns.
    """
    columns = order[..., None, :].expand_as(weight)
    left = weight.float().gather(-1, columns)
    steps = steps.expand_as(weight).gather(-1, columns)
    symbols = torch.empty_like(left)
    total = left.size(-1)
    for start in range(0, total, BLOCK):
        end = min(start + BLOCK, total)
        errors = torch.empty_like(left[..., start:end])
        for j in range(start, end):
            wanted, step = left[..., j], steps[..., j]
            symbols[..., j] = (wanted / step).round().clamp(-limit, limit)
            errors[..., j - start] = (wanted - symbols[..., j] * step) / factor[..., j, j, None]
            left[..., j + 1 : end] -= errors[..., j - start, None] * factor[..., None, j, j + 1 : end]
        left[..., end:] -= errors @ factor[..., start:end, end:]
    return torch.empty_like(symbols).scatter_(-1, columns, symbols).to(torch.int8)
