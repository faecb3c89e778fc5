"""Squared ReLU inside the matrix products of the MLP, as an operator that torch.compile takes whole.

Apart from its products, the MLP of a reference step reads and writes its hidden layer five times, which takes 4.7 ms on
an H200. Here the forward product squares what it writes, and the backward product multiplies what it writes by the
derivative, 2 relu(h) = 2 sqrt(y), so that only the squared output y is kept. Needs Triton and a Hopper GPU or newer.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it may run: it needs 16-bit numbers and a GPU with a tensor memory accelerator."""
    return torch.cuda.get_device_capability(device) >= (9, 0) and dtype in (torch.bfloat16, torch.float16)


def runs_on(widths: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """Try it forward and backward; besides, it needs Triton."""
    if not is_supported(device, dtype):
        return False
    dim, hidden = widths
    x, up, down = (
        torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        for shape in ((128, dim), (hidden, dim), (dim, hidden))
    )
    try:
        out = squared_relu_mlp(x, up, down)[0]
        out.backward(torch.ones_like(out))
    except Exception:  # no Triton, another version of it, no compiler, odd widths: it cannot be used
        return False
    return x.grad is not None and bool(x.grad.isfinite().all())


def _product(a: Tensor, b: Tensor, squared: Tensor | None) -> Tensor:
    """The kernel of `trainer.kernels.fused_mlp_triton`, whose import needs Triton."""
    return import_module("trainer.kernels.fused_mlp_triton").product(a, b, squared)


@torch.library.custom_op("golf_trainer::squared_relu_mlp", mutates_args=())
def squared_relu_mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Feed positions forward.

    Args:
        x: (N, D), 16-bit, contiguous.
        up: (H, D) of the same type.
        down: (D, H) of the same type.

    Returns:
        relu(x up^T)^2 down^T, (N, D), and relu(x up^T)^2, (N, H).
    """
    y = _product(x, up, None)
    return F.linear(y, down), y


@squared_relu_mlp.register_fake
def _(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.size(0), up.size(0))


@torch.library.custom_op("golf_trainer::squared_relu_mlp_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden_grad = _product(grad, down.mT.contiguous(), y)
    return hidden_grad @ up, hidden_grad.mT @ x, grad.mT @ y


@_backward.register_fake
def _(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad.contiguous(), *ctx.saved_tensors)


squared_relu_mlp.register_autograd(_differentiate, setup_context=_save)
