"""One training step in plain torch: micro-batches, backward, update.

`backward` and `update` are passed in: Lightning's in a run, raw ones in the warm-up and the benchmarks.
"""

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def train_step(
    loss_fn: Callable[[Tensor, Tensor, int], Tensor],
    tokens: Tensor,
    micro_batches: int,
    backward: Callable[[Tensor, bool], None],
    update: Callable[[], object],
) -> Tensor:
    """Learn from the tokens of one step.

    Args:
        loss_fn: Losses of (b, T) inputs and targets from a first position on, as `Transformer.nll`.
        tokens: (n, T + 1); in each row every token is the target of the one before. A place with -1 holds no token;
            nothing is learned there.
        micro_batches: Number of slices the n sequences are learned in, to bound memory.
        backward: Called with the loss of each slice and whether it is the last.
        update: Called once, when all gradients are there.

    Returns:
        Mean loss, a detached scalar on the device.
    """
    inputs, targets = tokens[:, :-1].clamp(min=0).chunk(micro_batches), tokens[:, 1:].chunk(micro_batches)
    count = (tokens[:, 1:] >= 0).sum()
    total = torch.zeros((), device=tokens.device)
    for index, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        loss = loss_fn(x, y, 0).sum() / count
        backward(loss, index == len(inputs) - 1)
        total = total + loss.detach()
    update()
    return total


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0: leave them).

    Returns:
        The norm before, a scalar on the device.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))


class StepFence:
    """Keep the host at most two steps ahead of the device, so that a clock read on the host is true."""

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        """Prepare for a device; on a CPU there is nothing to wait for.

        Args:
            device: Where the steps run.
            depth: Steps that may be queued.
        """
        self._depth = depth
        self._on_gpu = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def record(self) -> None:
        """Mark the end of a step; wait for the end of the step `depth` before it."""
        if not self._on_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > self._depth:
            self._events.popleft().synchronize()
