"""Rounding with error feedback: later columns compensate for the error of earlier ones.

Source: GPTQ (Frantar et al. 2023), with its activation order; the Cholesky form of optimal brain surgery.
"""

import torch
from torch import Tensor

DAMPING = 0.01  # times the mean of the Hessian's diagonal
BLOCK = 64  # columns whose errors are applied to the later columns at once


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Order the columns by importance, and factor the inverse of the Hessian in that order.

    Args:
        hessian: (..., C, C), positive semi-definite.

    Returns:
        (..., C) column numbers, the one with the largest diagonal first, and the upper triangular U, (..., C, C), of
        the damped Hessian's inverse U^T U. 1 / U_jj^2 is the cost of an error in column j after the later columns have
        compensated for it. A Hessian of zeros, of inputs that are always zero, counts as the identity.

    Raises:
        torch.linalg.LinAlgError: If it is not positive semi-definite.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    mean = diagonal.mean(-1, keepdim=True)
    damping = torch.where(mean == 0, 1.0, DAMPING * mean)
    damped = hessian.double() + torch.diag_embed(damping.expand_as(diagonal)).double()
    rows = order[..., :, None].expand_as(damped)
    ordered = damped.gather(-2, rows).gather(-1, rows.mT)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return order, torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


def round_with_feedback(weight: Tensor, quant_steps: Tensor, limit: int, order: Tensor, factor: Tensor) -> Tensor:
    """Round to multiples of the quantization steps.

    Args:
        weight: (..., R, C) float.
        quant_steps: (..., R, C) or broadcastable, distance of neighboring values.
        limit: Symbols lie between -limit and limit.
        order: (..., C) of `inverse_factor`.
        factor: (..., C, C) of `inverse_factor`.

    Returns:
        (..., R, C) int8 symbols, in the order of the weight's columns.
    """
    columns = order[..., None, :].expand_as(weight)
    remaining = weight.float().gather(-1, columns)  # weights, with the errors of the columns before fed back
    quant_steps = quant_steps.expand_as(weight).gather(-1, columns)
    symbols = torch.empty_like(remaining)
    total = remaining.size(-1)
    for start in range(0, total, BLOCK):
        end = min(start + BLOCK, total)
        errors = torch.empty_like(remaining[..., start:end])
        for j in range(start, end):
            value, quant_step = remaining[..., j], quant_steps[..., j]
            symbols[..., j] = (value / quant_step).round().clamp(-limit, limit)
            errors[..., j - start] = (value - symbols[..., j] * quant_step) / factor[..., j, j, None]
            remaining[..., j + 1 : end] -= errors[..., j - start, None] * factor[..., None, j, j + 1 : end]
        remaining[..., end:] -= errors @ factor[..., start:end, end:]
    return torch.empty_like(symbols).scatter_(-1, columns, symbols).to(torch.int8)
