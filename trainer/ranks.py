"""What the processes of a run tell each other between two steps."""

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a number over the processes of the run, on the device: the host waits for nobody."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)  # gloo knows no mean
    return total / dist.get_world_size()


class HostChannel:
    """Shares a number on the host, so that no process waits for what its device still has to do."""

    def __init__(self, processes: int) -> None:
        """Open it; all processes do at the same time.

        Args:
            processes: Of the run.
        """
        self._group = dist.new_group(backend="gloo") if processes > 1 else None

    def largest(self, value: float) -> float:
        """The largest value that a process gives; all of them have to ask."""
        if self._group is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return float(shared)
