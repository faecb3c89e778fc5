"""Softcapped cross-entropy of 16-bit logits as one operator that reads them once.

Compiled from the formulas of `model.transformer`, a `frontier` step spends 5.1 ms of an H100 on it, most of them on a
running maximum and the exact tanh. Moving the bytes of the logits takes 2.1 ms. Needs Triton.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

TRITON = "trainer.kernels.fused_loss_triton"  # its import needs Triton
MAX_CAP = 40.0  # exp(-2 cap) must not vanish in float32


def is_supported(cap: float, dtype: torch.dtype) -> bool:
    """Whether it may run: it needs 16-bit numbers and a softcap of at most 40."""
    return 0 < cap <= MAX_CAP and dtype in (torch.bfloat16, torch.float16)


def runs_on(cap: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Try it forward and backward; besides, it needs Triton."""
    if not is_supported(cap, dtype):
        return False
    try:
        logits = torch.randn(4, 100, device=device, dtype=dtype).requires_grad_()
        targets = torch.arange(4, device=device)
        pairs = targets, torch.zeros(100, 100, dtype=torch.bool, device=device)
        nll = softcapped_nll(logits, targets, cap)[0] + softcapped_nll(logits, targets, cap, *pairs)[0]
        nll.sum().backward()
    except Exception:  # no Triton, another version of it, no compiler: it cannot be used
        return False
    return logits.grad is not None and bool(logits.grad.isfinite().all() and nll.isfinite().all())


@torch.library.custom_op("golf_trainer::softcapped_nll", mutates_args=())
def softcapped_nll(
    logits: Tensor, targets: Tensor, cap: float, previous: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target under softmax(cap tanh(logits / cap)).

    Args:
        logits: (N, V), 16-bit.
        targets: (N,), any integer type.
        cap: Softcap of the logits, at most 40.
        previous: (N,), any integer type: the token before each target; only used with `excluded`.
        excluded: (V, V) bool: tokens that have no probability after a token, among them no target.

    Returns:
        (N,) float32 in nats, and the sums of exponentials that the backward pass needs, (N,) float32.
    """
    return import_module(TRITON).forward(logits.contiguous(), targets.contiguous(), cap, *_rows(previous, excluded))


def _rows(previous: Tensor | None, excluded: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if previous is None or excluded is None:
        return None, None
    return previous.contiguous(), excluded.contiguous()


@softcapped_nll.register_fake
def _(
    logits: Tensor, targets: Tensor, cap: float, previous: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    nll, sums = (logits.new_empty(logits.size(0), dtype=torch.float32) for _ in range(2))
    return nll, sums


@torch.library.custom_op("golf_trainer::softcapped_nll_backward", mutates_args=())
def _backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    cap: float,
    previous: Tensor | None,
    excluded: Tensor | None,
) -> Tensor:
    return import_module(TRITON).backward(grad, logits, targets, sums, cap, previous, excluded)


@_backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    cap: float,
    previous: Tensor | None,
    excluded: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.cap, previous, excluded = inputs
    ctx.save_for_backward(logits, targets, output[1], previous, excluded)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    logits, targets, sums, previous, excluded = ctx.saved_tensors
    tensors = [each.contiguous() for each in (grad, logits, targets, sums)]
    return _backward(*tensors, ctx.cap, *_rows(previous, excluded)), None, None, None, None


softcapped_nll.register_autograd(_differentiate, setup_context=_save)
