"""Muon's orthogonalization: Newton-Schulz iterations on batches of matrices, divided between processes.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.device import has_bfloat16
from trainer.distributed import gather_from_ranks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix towards 1.

    Args:
        matrices: (N, rows, cols) with rows <= cols, in the precision to compute in.
        steps: Number of iterations.

    Returns:
        (N, rows, cols) of the same type.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Precision of the iterations: bfloat16 on a GPU that has it, else that of the parameter."""
    is_lowered = parameter.dtype == torch.float32 and has_bfloat16(parameter.device)
    return torch.bfloat16 if is_lowered else parameter.dtype


def orthogonalize(stacks: list[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of every stack of matrices, wide or tall.

    Tall matrices are transposed, and stacks that then have one shape become one batch. Several processes each compute a
    share, and one collective distributes all shares: all processes get the same bits, so their weights stay equal.

    Args:
        stacks: (N, rows, cols) each, on the same device and the same on all processes.
        steps: Number of iterations.

    Returns:
        Stacks of the same shapes, in the precision of the iterations.
    """
    dtype = compute_dtype(stacks[0])
    wide = [stack.to(dtype).mT if stack.size(1) > stack.size(2) else stack.to(dtype) for stack in stacks]
    members: dict[torch.Size, list[int]] = defaultdict(list)
    for index, stack in enumerate(wide):
        members[stack.shape[1:]].append(index)
    batches = _divided([torch.cat([wide[index] for index in indices]) for indices in members.values()], steps)
    results: dict[int, Tensor] = {}
    for indices, batch in zip(members.values(), batches, strict=True):
        results |= zip(indices, batch.split([len(wide[index]) for index in indices]), strict=True)
    return [results[i].mT if stack.size(1) > stack.size(2) else results[i] for i, stack in enumerate(stacks)]


def _divided(batches: list[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of every batch, divided between the processes if there are several."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return [newton_schulz(batch, steps) for batch in batches]
    rank = dist.get_rank()
    shares = []
    for batch in batches:
        size = -(-len(batch) // world)  # rounded up: equal shares, the last ones padded
        share = batch.new_zeros(size, *batch.shape[1:])
        local = batch[rank * size : (rank + 1) * size]
        if len(local):
            share[: len(local)] = newton_schulz(local, steps)
        shares.append(share.flatten())
    gathered = gather_from_ranks(torch.cat(shares)).split(
        [len(share) for share in shares], dim=1
    )  # (world, share) each
    return [part.reshape(-1, *batch.shape[1:])[: len(batch)] for part, batch in zip(gathered, batches, strict=True)]
