"""What every part of the model uses: a matrix that computes in its input's type, and RMS normalization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps  # also in bfloat16, as in the reference


class Linear(nn.Linear):
    """A matrix without bias, stored in float32 and used in the type of its input.

    The explicit cast makes the result independent of the list of operations that autocast converts.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map (..., in_features) to (..., out_features), each output times its `scale`, (out_features,)."""
        return F.linear(x, self.cast(x.dtype, scale))

    def cast(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The matrix as it is multiplied.

        The scale is multiplied into the matrix: its gradient then follows from the matrix's gradient, without a pass
        over all positions.
        """
        weight = self.weight if scale is None else scale[:, None] * self.weight
        return weight.to(dtype)


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension; there is no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


@torch.library.custom_op("golf_trainer::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """A copy that a compiled backward pass reads, instead of recomputing it in every kernel that needs it."""
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


materialize.register_autograd(lambda ctx, grad: grad)


def activation_dtype(weight: Tensor) -> torch.dtype:
    """The type of the activations: autocast's where it is on, else that of the weights."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
