"""How many bytes an artifact will have, before there are trained weights."""

from collections import defaultdict

import torch
from torch import Tensor

from trainer.model.config import TransformerConfig
from trainer.quantize.artifact import to_stored
from trainer.quantize.container import StoredTensor, compressed_size
from trainer.quantize.export import CAP_TOLERANCE
from trainer.quantize.policy import QuantizationConfig, smaller_configs, storage_dtype
from trainer.quantize.rounding import prune_smallest

SAMPLE = 2**18  # elements of each storage type that are compressed
# Trained rows have longer tails than normal ones, so their symbols take less: 0.965 to 0.975 in the packaged recipes.
TRAINED = 0.97
# At the finest step of loss-aware rounding: `frontier` took 2.5 bits at the step 2e-4, and 0.95 more for each halving.
BITS_AT_FINEST = 5.6


def forecast_bytes(
    state: dict[str, Tensor], model: TransformerConfig, quantization: QuantizationConfig, room: int, shrinks: bool
) -> int | None:
    """Estimate the size of an artifact from normally distributed weights.

    Args:
        state: Tensors of the model; only their names and shapes count.
        model: Config of the model.
        quantization: How the weights are stored.
        room: Bytes that the artifact may have.
        shrinks: Whether it is stored more coarsely until it fits.

    Returns:
        Bytes, more than `room` if it does not fit; None where they follow from the trained weights alone, as those of
        loss-aware rounding with a given step do.
    """
    if quantization.rounding == "loss_aware":
        if not shrinks:
            return None
        parameters = sum(tensor.numel() for tensor in state.values())
        finest = min(room - CAP_TOLERANCE // 2, round(parameters * BITS_AT_FINEST / 8))
        return max(finest, _without_symbols(state, model, quantization))
    size = _size(state, model, quantization)
    if size > room and shrinks:
        for choice in smaller_configs(quantization):
            if (size := _size(state, model, choice)) <= room:
                break
    return size


def _without_symbols(state: dict[str, Tensor], model: TransformerConfig, quantization: QuantizationConfig) -> int:
    """Bytes of what no coarser step shortens: numbers that stay floats, scales of rows, exponents of columns."""
    size = 0
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            size += 2 * tensor.size(0) + tensor.size(1)
        else:
            size += tensor.numel() * (4 if storage_dtype(name, tensor, model, quantization) == "float32" else 2)
    return size


def _size(state: dict[str, Tensor], model: TransformerConfig, quantization: QuantizationConfig) -> int:
    dtypes = {name: storage_dtype(name, tensor, model, quantization) for name, tensor in state.items()}
    elements: dict[str, int] = defaultdict(int)
    for name, tensor in state.items():
        elements[dtypes[name]] += tensor.numel()
    sampled: dict[str, list[StoredTensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        dtype = dtypes[name]
        share = min(1.0, SAMPLE / elements[dtype])
        rows = max(1, round(share * tensor.size(0))) if tensor.ndim == 2 else None
        values = torch.randn((rows, tensor.size(1)) if rows else tensor.shape, generator=generator)
        if rows and tensor.numel() > quantization.prune_above:
            values = prune_smallest(values, quantization.prune_frac)
        sampled[dtype].append(to_stored(values, dtype))
    return round(
        TRAINED
        * sum(
            compressed_size(tensors, quantization.codec)
            * elements[dtype]
            / sum(tensor.values.size for tensor in tensors)
            for dtype, tensors in sampled.items()
        )
    )
