"""What the processes of a run tell each other between two steps."""

import torch
import torch.distributed as dist


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
