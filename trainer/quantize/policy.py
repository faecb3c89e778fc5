"""Which tensor is stored in which type."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from trainer.model.transformer import TransformerConfig
from trainer.quantize.container import Codec

TIGHT_PRUNING = 0.08
Kind = str  # "int2" ... "int8", "float16" or "float32"


@dataclass(frozen=True)
class QuantizationConfig:
    """The reference's mixed precision.

    Args:
        mlp_bits: Bits of the MLP matrices, 2 to 8.
        attention_bits: Bits of the attention matrices.
        bigram_bits: Bits of the bigram table and its projection.
        other_bits: Bits of any other large matrix.
        fp16_key_blocks: Blocks whose key projection stays float16; negative counts from the end.
        small_tensor: Tensors of at most this many elements stay float16.
        prune_frac: Share of the smallest magnitudes of each large matrix set to zero first.
        prune_above: A matrix is large with more elements than this.
        rounding: nearest: to the nearest of so many bits, with a row's largest magnitude at the end of the range.
            sensitive: every matrix product's matrix by what the loss notices, measured on training text (GPTQ with
            steps of its own for rows and columns); mlp_bits, attention_bits and prune_frac do not apply to them.
        step: Of sensitive rounding; the expected rise of the loss goes with its square. export.fit searches for it.
        calibration_sequences: Training sequences that sensitive rounding measures on.
        codec: What makes symbols short: zstd-22, or ans, an entropy coder with fitted frequencies.
    """

    mlp_bits: int = 5
    attention_bits: int = 6
    bigram_bits: int = 6
    other_bits: int = 8
    fp16_key_blocks: list[int] = field(default_factory=lambda: [-2])
    small_tensor: int = 8192
    prune_frac: float = 0.03
    prune_above: int = 65536
    rounding: Literal["nearest", "sensitive"] = "nearest"
    step: float = 2e-4
    calibration_sequences: int = 64
    codec: Codec = "zstd-22"

    def __post_init__(self) -> None:
        for bits in (self.mlp_bits, self.attention_bits, self.bigram_bits, self.other_bits):
            if not 2 <= bits <= 8:
                raise ValueError(f"quantization: bits must lie between 2 and 8, not {bits}")
        if not 0 <= self.prune_frac < 1:
            raise ValueError(f"quantization.prune_frac must lie in [0, 1), not {self.prune_frac}")
        if self.step <= 0 or self.calibration_sequences < 1:
            raise ValueError("quantization: step must be positive and calibration_sequences at least 1")


def tighter(config: QuantizationConfig) -> Iterator[QuantizationConfig]:
    """Choices that take fewer bytes, each fewer than the one before; the MLP gives first, as in the reference."""
    for mlp, attention, bigram in ((0, 0, 0), (1, 0, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2)):
        yield replace(
            config,
            prune_frac=max(config.prune_frac, TIGHT_PRUNING),
            mlp_bits=max(2, config.mlp_bits - mlp),
            attention_bits=max(2, config.attention_bits - attention),
            bigram_bits=max(2, config.bigram_bits - bigram),
        )


def kind_of(name: str, tensor: Tensor, model: TransformerConfig, config: QuantizationConfig) -> Kind:
    """The stored type of one tensor of the model's state.

    Args:
        name: Its key in the state dict.
        tensor: Its value.
        model: The model it belongs to.
        config: The choices.
    """
    kept_keys = {f"blocks.{block % model.num_layers}.attention.k.weight" for block in config.fp16_key_blocks}
    is_small = tensor.numel() <= config.small_tensor or tensor.ndim == 0  # a number has no row to round
    if is_small or name == "token_embedding.weight" or name in kept_keys:
        return "float16"
    if name.endswith((".mix", "_scale", "skip_weights", ".gate", "_gain")):
        return "float32"
    if ".mlp." in name:
        return f"int{config.mlp_bits}"
    if ".attention." in name:
        return f"int{config.attention_bits}"
    if name.startswith("bigram."):
        return f"int{config.bigram_bits}"
    return f"int{config.other_bits}"
