"""FLOPs of a token, and the peak of a GPU: together, model FLOPs utilization (MFU)."""

import re

import torch

from trainer.device import device_name
from trainer.model.config import TransformerConfig

# Dense bfloat16 (float16 where there is none) with float32 sums, FLOP/s, from the vendor's data sheets.
# Where the words of two names are in a device's name, the first one counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX PRO 6000 Blackwell": 504e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "V100": 125e12,
    "T4": 65e12,
}
OTHER_CHIPS = {"Laptop", "Max", "D"}  # slower ones that share a name, such as RTX 5090 Laptop GPU and RTX 4090 D


def forward_flops(config: TransformerConfig, length: int, is_looped: bool = True) -> float:
    """FLOPs per token of the forward pass; a training step takes three times as many.

    Each weight of a matrix costs a multiplication and an addition. Causal attention at position t costs two products
    with t keys or values, half the sequence on average, or with those of the attention window. Norms and other
    element-wise work are not counted.

    Args:
        config: The model.
        length: Tokens of a sequence.
        is_looped: Whether its depth recurrence is on.
    """
    order = config.block_order(is_looped)
    heads, kv_heads, head_dim = config.heads
    dim = config.model_dim
    attention = dim * head_dim * (heads + 2 * kv_heads) + dim * dim
    mlp = 2 * config.mlp.ratio * dim * dim
    bigram = config.bigram.dim * dim if config.bigram.buckets else 0
    weights = len(order) * (attention + mlp) + bigram + config.vocab_size * dim
    windows = (min(config.attention.window_of(block) or length, length) for block in order)
    keys = sum(window - window * (window - 1) / (2 * length) for window in windows)  # per position, on average
    return 2 * weights + 4 * heads * head_dim * keys


def peak_flops(device: torch.device) -> float | None:
    """The peak of a GPU in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name_parts = re.split("[ -]", device_name(device))
    if OTHER_CHIPS & set(name_parts):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= set(name_parts)), None)
