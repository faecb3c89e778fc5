"""Everything that the processes of a distributed run tell each other."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.rank import rank

Result = TypeVar("Result")
PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # gloo's wording


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a number over all processes, computed on the device: the host waits for nobody."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)  # gloo has no mean
    return total / dist.get_world_size()


def all_ranks_agree(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every process; all of them must call this."""
    answer = torch.tensor(int(condition), device=device)
    if dist.is_initialized():
        dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def gather_from_ranks(values: Tensor) -> Tensor:
    """Collect a flat tensor of equal length from every process.

    Args:
        values: (n,) of this process.

    Returns:
        (processes, n), the same bits on every process.
    """
    world = dist.get_world_size()
    gathered = values.new_empty(world * len(values))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its new name, from torch 2.13 on
    gather(gathered, values)
    return gathered.view(world, -1)


def on_first_rank(action: Callable[[], Result], device: torch.device) -> Result | None:
    """Do something on rank 0 while the others wait.

    Args:
        action: Called on rank 0 only.
        device: Device of this process, for the message between the processes.

    Returns:
        What `action` returns on rank 0, None on the others.

    Raises:
        SystemExit: On the other processes, with exit code 1, if the action fails; rank 0 raises its own error.
    """
    result: Result | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = action()
        except Exception as failure:  # raised below, once the others know
            error = failure
    succeeded = all_ranks_agree(error is None, device)
    if error is not None:
        raise error
    if not succeeded:
        raise SystemExit(1)
    return result


def bytes_of_first_rank(read: Callable[[], bytes], device: torch.device) -> bytes:
    """What rank 0 reads, on all processes: the others may not see its files.

    Args:
        read: Called on rank 0 only.
        device: Device of this process.
    """
    content = on_first_rank(read, device)
    if not dist.is_initialized():
        assert content is not None
        return content
    length = torch.tensor(len(content or b""), device=device)
    dist.broadcast(length, 0)
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(int(length)).byte()
    shared = tensor.to(device)
    dist.broadcast(shared, 0)
    return shared.cpu().numpy().tobytes()


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because one of its processes is gone."""
    return isinstance(error, dist.DistBackendError) or any(text in str(error) for text in PEER_LOST)


class HostChannel:
    """Shares a number between the hosts, so that no process waits for the work queued on its device."""

    def __init__(self, world_size: int) -> None:
        """Open the channel; all processes must do so at the same time.

        Args:
            world_size: Number of processes in the run.
        """
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def largest(self, value: float) -> float:
        """The largest value that any process gives; all of them must call this."""
        if self._group is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return float(shared)
