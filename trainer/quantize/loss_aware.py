"""Loss-aware rounding: quantization steps that follow the loss, so that one number trades loss against bytes.

An entropy coder spends about log2(1 / step) bits on a weight, and rounding raises the loss by the square of the step
times the sensitivity of the loss to that weight. The bits are spent best when every weight's step times the square root
of its sensitivity is the same (reverse water-filling at high rate; Cover and Thomas 2006, chapter 10). The sensitivity
of a weight is that of its row, from the gradients, times that of its column after the later columns have compensated
for its error, from the Cholesky factor of the inputs' second moments that GPTQ uses anyway.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.quantize.calibration import Moments
from trainer.quantize.container import EXPONENTS_PER_OCTAVE, StoredTensor
from trainer.quantize.entropy_coding import MAX_SYMBOL
from trainer.quantize.gptq import inverse_factor, round_with_feedback
from trainer.quantize.rounding import SMALLEST_SCALE

ROW_EXPONENT = 0.5  # of a row's sensitivity relative to its matrix's mean: single rows are measured roughly
LARGEST_SCALE = 6e4  # that float16 can hold
MIN_RELATIVE = 1e-3  # lower bound of that, such as for a token that calibration did not see


@dataclass
class _Group:
    """Matrices of one shape, stacked."""

    names: list[str]
    weight: Tensor  # (N, R, C)
    order: Tensor  # (N, C)
    factor: Tensor  # (N, C, C)
    rows: Tensor  # (N, R), relative quantization steps
    columns: Tensor  # (N, C) int8, relative quantization steps as exponents


class LossAwareRounding:
    """The matrices of a model, prepared once and rounded as often as the search for a size needs."""

    def __init__(self, state: dict[str, Tensor], moments: dict[str, Moments]) -> None:
        """Factor all Hessians.

        Args:
            state: The model's tensors, on the device to compute on.
            moments: Moments of the matrices to round, by name.
        """
        shapes: dict[torch.Size, list[str]] = defaultdict(list)
        for name in moments:
            shapes[state[name].shape].append(name)
        self.groups = [self._prepare(names, state, moments) for names in shapes.values()]

    @staticmethod
    def _prepare(names: list[str], state: dict[str, Tensor], moments: dict[str, Moments]) -> _Group:
        try:
            order, factor = inverse_factor(torch.stack([moments[name].hessian for name in names]))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise UserError(
                f"the inputs of {', '.join(names)} cannot be weighed in calibration ({first_line(error)}); store the "
                "model with --export.quantization.rounding nearest"
            ) from error
        columns = torch.empty_like(factor[..., 0]).scatter_(-1, order, factor.diagonal(dim1=-2, dim2=-1))
        log_mean = columns.log2().mean(-1, keepdim=True)
        exponents = (EXPONENTS_PER_OCTAVE * (columns.log2() - log_mean)).round().clamp(-127, 127).to(torch.int8)
        sensitivity = torch.stack([moments[name].sensitivity for name in names])
        mean = sensitivity.mean(-1, keepdim=True).clamp(min=1e-30)
        relative = (sensitivity / mean).clamp(min=MIN_RELATIVE) ** ROW_EXPONENT
        rows = log_mean.exp2() / (mean * relative).sqrt()
        return _Group(names, torch.stack([state[name].float() for name in names]), order, factor, rows, exponents)

    def round(self, quant_step: float) -> dict[str, StoredTensor]:
        """Round every matrix.

        Args:
            quant_step: Rounding a weight raises the loss by about quant_step^2 / 24 nats, to second order.

        Returns:
            Stored tensors by name.
        """
        stored = {}
        for group in self.groups:
            columns = (group.columns.float() / EXPONENTS_PER_OCTAVE).exp2()[:, None]  # (N, 1, C)
            min_rows = (group.weight.abs() / columns).amax(-1) / MAX_SYMBOL
            if min_rows.max() > LARGEST_SCALE:
                raise UserError(
                    f"weights of {', '.join(group.names)} are up to {group.weight.abs().max():.2g}, more than an "
                    "artifact can hold; train with a lower learning rate"
                )
            rows = torch.maximum(quant_step * group.rows, min_rows).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
            quant_steps = rows.float()[..., None] * columns
            symbols = round_with_feedback(group.weight, quant_steps, MAX_SYMBOL, group.order, group.factor)
            for index, name in enumerate(group.names):
                stored[name] = StoredTensor(
                    "int8",
                    symbols[index].cpu().numpy(),
                    rows[index].cpu().numpy(),
                    group.columns[index].cpu().numpy(),
                )
        return stored
