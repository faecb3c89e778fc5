"""One training step in plain torch: micro-batches, backward, update.

`backward` and `update` are passed in: Lightning's in a run, raw ones in the warm-up and the benchmarks.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.device import record_event


def train_step(
    loss_fn: Callable[[Tensor, Tensor, int], Tensor],
    tokens: Tensor,
    micro_batches: int,
    backward: Callable[[Tensor, bool], None],
    update: Callable[[], object],
    mean: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Train on the tokens of one step, with gradient accumulation.

    Args:
        loss_fn: Losses of (b, T) inputs and targets from a first position on, as `Transformer.nll`.
        tokens: (n, T + 1); in each row every token is the target of the one before.
        micro_batches: Number of slices of the n sequences whose gradients are accumulated, to bound memory.
        backward: Called with the loss of each slice and whether it is the last.
        update: Called once, when all gradients are there.
        mean: Takes the mean of a number over all processes of the step.

    Returns:
        Mean loss over the targets of all of them, a detached scalar on the device.
    """
    inputs, targets = tokens[:, :-1].chunk(micro_batches), tokens[:, 1:].chunk(micro_batches)
    count = tokens[:, 1:].numel()
    total = torch.zeros((), device=tokens.device)
    for index, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        loss = loss_fn(x, y, 0).sum() / count
        backward(loss, index == len(inputs) - 1)
        total = total + loss.detach()
    update()
    return mean(total)


def micro_batch_count(sequences: int, sequence_length: int, tokens: int) -> int:
    """Number of micro-batches of at most so many tokens, but at least one sequence, that a step is cut into."""
    return -(-sequences // max(1, tokens // sequence_length))


class GradientNorms(NamedTuple):
    """Norms of the gradients before clipping, on the device.

    Attributes:
        total: Global norm, a scalar; not finite if one gradient is not.
        each: Norm of every tensor, (tensors,).
    """

    total: Tensor
    each: Tensor


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> GradientNorms:
    """Scale all gradients so that their global norm is at most `max_norm` (None: no limit)."""
    used = [parameter for parameter in parameters if parameter.grad is not None]
    each = torch.stack(torch._foreach_norm([parameter.grad for parameter in used if parameter.grad is not None]))
    total = torch.linalg.vector_norm(each)
    torch.nn.utils.clip_grads_with_norm_(used, float("inf") if max_norm is None else max_norm, total)
    return GradientNorms(total, each)


class StepFence:
    """Keep the host at most two steps ahead of the device, so that a clock read on the host is true.

    It also copies numbers of each step to the host without another wait.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare for a device; on a CPU there is nothing to wait for.

        Args:
            device: Where the steps run.
        """
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._depth = 2 if self._on_gpu else 0  # steps that may be queued
        self._queued: deque[tuple[int, Tensor, Any]] = deque()

    def record(self, step: int, values: Tensor) -> list[tuple[int, Tensor]]:
        """Mark the end of a step; on a GPU, wait for the end of the step two before it.

        Args:
            step: Its number.
            values: Its numbers, on the device.

        Returns:
            (step, values) of the steps that were completed since the last call, on the host.
        """
        if self._on_gpu:
            values = values.to("cpu", non_blocking=True)  # into pinned memory
        self._queued.append((step, values, record_event(self._device)))
        return self._take(self._depth)

    def drain(self) -> list[tuple[int, Tensor]]:
        """Wait for all steps; returns what `record` has not returned yet."""
        return self._take(0)

    def _take(self, left: int) -> list[tuple[int, Tensor]]:
        done = []
        while len(self._queued) > left:
            step, values, event = self._queued.popleft()
            if event is not None:
                event.synchronize()
            done.append((step, values))
        return done
