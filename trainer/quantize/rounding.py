"""Rounding to symmetric integers with a scale per row, and magnitude pruning."""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16


def prune_smallest(tensor: Tensor, fraction: float) -> Tensor:
    """A copy in which the floor(fraction * n) smallest magnitudes are zero."""
    count = int(fraction * tensor.numel())
    pruned = tensor.clone()
    if count:
        smallest = tensor.abs().flatten().topk(count, largest=False).indices
        pruned.view(-1)[smallest] = 0
    return pruned


def quantize_rows(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round every row to integers of `bits` bits times a float16 scale.

    The scale maps the row's largest magnitude to 2^(bits-1) - 1; it is rounded to float16 first and the row divided by
    the rounded value. Half rounds to even. A row of zeros stays zero.

    Args:
        tensor: (rows, cols), or (n,) as one row.
        bits: 2 to 8.

    Returns:
        int8 of the same shape, and (rows,) float16 scales.
    """
    rows = tensor.float().reshape(-1, tensor.size(-1))
    clip = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(dim=1) / clip).clamp(min=SMALLEST_SCALE).half()
    symbols = (rows / scale.float()[:, None]).round().clamp(-clip - 1, clip).to(torch.int8)
    return symbols.view(tensor.shape), scale
