"""Orthogonalisation of Muon's updates: Newton-Schulz on batches of matrices, divided between processes.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix towards 1.

    Args:
        matrices: (N, rows, cols) with rows <= cols, in the precision to compute in.
        steps: Iterations.

    Returns:
        (N, rows, cols) of the same type.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalisation_dtype(parameter: Tensor) -> torch.dtype:
    """Low precision where the hardware gains from it: bfloat16 on a GPU that has it, else the parameter's own."""
    low = parameter.is_cuda and parameter.dtype == torch.float32
    return torch.bfloat16 if low and torch.cuda.is_bf16_supported(including_emulation=False) else parameter.dtype


def orthogonalise(batches: list[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of every batch; several processes each take a part, and one collective hands all parts round.

    All processes get the same bits, so their weights stay equal.

    Args:
        batches: (N, rows, cols) each, of one type, the same on all processes.
        steps: Iterations.

    Returns:
        Batches of the same shapes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return [newton_schulz(batch, steps) for batch in batches]
    rank = dist.get_rank()
    shares = []
    for batch in batches:
        size = -(-len(batch) // world)  # rounded up: equal shares, the last ones padded
        share = batch.new_zeros(size, *batch.shape[1:])
        mine = batch[rank * size : (rank + 1) * size]
        if len(mine):
            share[: len(mine)] = newton_schulz(mine, steps)
        shares.append(share.flatten())
    sent = torch.cat(shares)
    gathered = sent.new_empty(world * len(sent))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its new name, from torch 2.13 on
    gather(gathered, sent)
    parts = gathered.view(world, -1).split([len(share) for share in shares], dim=1)  # (world, share) each
    return [part.reshape(-1, *batch.shape[1:])[: len(batch)] for part, batch in zip(parts, batches, strict=True)]
