"""What a token costs in floating-point operations, and what a GPU can do: together, its utilisation."""

import re

import torch

from trainer.model.transformer import TransformerConfig

# Dense bfloat16 (float16 where there is none) with float32 sums, FLOP/s, from the vendor's data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "T4": 65e12,
}


def forward_flops(config: TransformerConfig, length: int, looped: bool = True) -> float:
    """Operations of the forward pass per token; a training step takes three times as many.

    A weight of a matrix costs a multiplication and an addition. Causal attention at position t costs two products with
    t keys or values, half the sequence on average, or with those of the window. Norms and other element-wise work are
    not counted.

    Args:
        config: The model.
        length: Tokens of a sequence.
        looped: Whether its loop is on.
    """
    order = config.order(looped)
    heads, kv_heads, width = config.heads
    dim = config.model_dim
    attention = dim * width * (heads + 2 * kv_heads) + dim * dim
    mlp = 2 * config.mlp.ratio * dim * dim
    bigram = config.bigram.dim * dim if config.bigram.buckets else 0
    weights = len(order) * (attention + mlp) + bigram + config.vocab_size * dim
    windows = (min(config.attention.window_of(block) or length, length) for block in order)
    keys = sum(window - window * (window - 1) / (2 * length) for window in windows)  # of a position, on average
    return 2 * weights + 4 * heads * width * keys


def peak_flops(device: torch.device) -> float | None:
    """The card's peak in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(device))
    return next((peak for key, peak in PEAK_FLOPS.items() if set(key.split()) <= set(words)), None)
