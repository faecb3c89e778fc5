"""Rounding steps by what the loss notices, so that one number trades its rise against bytes for the whole model.

An entropy coder pays about log2(1 / step) bits for a weight, wherever it lies, and a step raises the loss by its square
times how much the loss notices that weight. The bits are spent best when every weight's step times the square root of
its sensitivity is the same (reverse water-filling at high rate; Cover and Thomas 2006, chapter 10). The sensitivity of
a weight is its row's, from the gradients, times its column's after the columns behind it have made up for what they
can, from the Cholesky factor of the inputs' second moments that GPTQ uses anyway.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.quantize.calibration import Moments
from trainer.quantize.container import COLUMN_STEPS, StoredTensor
from trainer.quantize.gptq import inverse_factor, round_with_feedback
from trainer.quantize.intn import SMALLEST_SCALE

LIMIT = 127  # of a symbol; rare, since most take 2 to 6 bits
TRUST = 0.5  # exponent on a row's sensitivity relative to its matrix's mean: single rows are measured roughly
FAINTEST = 1e-3  # least relative sensitivity of a row, such as that of a piece that calibration did not meet


@dataclass
class _Group:
    """Matrices of one shape, stacked."""

    names: list[str]
    weight: Tensor  # (N, R, C)
    order: Tensor  # (N, C)
    factor: Tensor  # (N, C, C)
    rows: Tensor  # (N, R), relative steps
    columns: Tensor  # (N, C) int8, relative steps as exponents


class SensitiveRounding:
    """The matrices of a model, prepared once and rounded as often as a size is searched for."""

    def __init__(self, state: dict[str, Tensor], moments: dict[str, Moments]) -> None:
        """Factor all Hessians.

        Args:
            state: The model's tensors, on the device to compute on.
            moments: Of the matrices that are to be rounded.
        """
        shapes: dict[torch.Size, list[str]] = defaultdict(list)
        for name in moments:
            shapes[state[name].shape].append(name)
        self.groups = [self._prepare(names, state, moments) for names in shapes.values()]

    @staticmethod
    def _prepare(names: list[str], state: dict[str, Tensor], moments: dict[str, Moments]) -> _Group:
        order, factor = inverse_factor(torch.stack([moments[name].hessian for name in names]))
        columns = torch.empty_like(factor[..., 0]).scatter_(-1, order, factor.diagonal(dim1=-2, dim2=-1))
        level = columns.log2().mean(-1, keepdim=True)
        exponents = (COLUMN_STEPS * (columns.log2() - level)).round().clamp(-127, 127).to(torch.int8)
        sensitivity = torch.stack([moments[name].sensitivity for name in names])
        mean = sensitivity.mean(-1, keepdim=True).clamp(min=1e-30)
        relative = (sensitivity / mean).clamp(min=FAINTEST) ** TRUST
        rows = level.exp2() / (mean * relative).sqrt()
        return _Group(names, torch.stack([state[name].float() for name in names]), order, factor, rows, exponents)

    def round(self, step: float) -> dict[str, StoredTensor]:
        """Round every matrix.

        Args:
            step: Rounding one weight is expected to raise the loss by step^2 / 24 nats, to second order.

        Returns:
            Stored tensors by name.
        """
        found = {}
        for group in self.groups:
            columns = (group.columns.float() / COLUMN_STEPS).exp2()[:, None]  # (N, 1, C)
            needed = (group.weight.abs() / columns).amax(-1) / LIMIT
            rows = torch.maximum(step * group.rows, needed).clamp(SMALLEST_SCALE, 6e4).half()
            steps = rows.float()[..., None] * columns
            symbols = round_with_feedback(group.weight, steps, LIMIT, group.order, group.factor)
            for index, name in enumerate(group.names):
                found[name] = StoredTensor(
                    "int8",
                    symbols[index].cpu().numpy(),
                    rows[index].cpu().numpy(),
                    group.columns[index].cpu().numpy(),
                )
        return found
