"""The storage type of each tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from trainer.model.config import TransformerConfig
from trainer.quantize.container import Codec

SHRINK_PRUNING = 0.08  # pruned fraction where the file has to shrink


@dataclass(frozen=True)
class QuantizationConfig:
    """How the weights are stored; the defaults are the reference's mixed precision.

    Args:
        mlp_bits: Bits of the MLP matrices (2 to 8).
        attention_bits: Bits of the attention matrices (2 to 8).
        bigram_bits: Bits of the bigram table and its projection (2 to 8).
        other_bits: Bits of any other large matrix (2 to 8).
        fp16_key_blocks: Blocks whose key projection stays float16 (0 to num_layers - 1; others modulo num_layers, so
            that -1 is the last).
        small_tensor: Largest number of elements of a tensor that stays float16 (at least 0).
        prune_frac: Fraction of the entries of each large matrix, those of smallest magnitude, that is set to zero
            before rounding (0 to 1).
        prune_above: Number of elements above which a matrix is large (at least 0).
        rounding: How matrices are rounded. nearest: to the nearest integer, with each row's largest magnitude at the
            end of the range. loss_aware: with GPTQ and with steps for rows and columns that follow from the loss on
            training text; mlp_bits, attention_bits and prune_frac do not apply to them.
        quant_step: Global step of loss-aware rounding (above 0); the expected rise of the loss is proportional to its
            square. With export.shrink_to_cap it is searched for.
        calibration_sequences: Number of training sequences that loss-aware rounding measures the loss on (at least 1).
        codec: Entropy coder of the symbols: zstd-22, or ans with fitted frequencies.
    """

    mlp_bits: int = 5
    attention_bits: int = 6
    bigram_bits: int = 6
    other_bits: int = 8
    fp16_key_blocks: list[int] = field(default_factory=lambda: [-2])
    small_tensor: int = 8192
    prune_frac: float = 0.03
    prune_above: int = 65536
    rounding: Literal["nearest", "loss_aware"] = "nearest"
    quant_step: float = 2e-4
    calibration_sequences: int = 64
    codec: Codec = "zstd-22"

    def __post_init__(self) -> None:
        for bits in (self.mlp_bits, self.attention_bits, self.bigram_bits, self.other_bits):
            if not 2 <= bits <= 8:
                raise ValueError(f"export.quantization: bits must be between 2 and 8, not {bits}")
        if not 0 <= self.prune_frac < 1:
            raise ValueError(f"export.quantization.prune_frac must be in [0, 1), not {self.prune_frac}")
        for name in ("small_tensor", "prune_above"):
            if getattr(self, name) < 0:
                raise ValueError(f"export.quantization.{name} must be at least 0, not {getattr(self, name)}")
        if not self.quant_step > 0:
            raise ValueError(f"export.quantization.quant_step must be positive, not {self.quant_step}")
        if self.calibration_sequences < 1:
            raise ValueError(
                f"export.quantization.calibration_sequences must be at least 1, not {self.calibration_sequences}"
            )


def smaller_configs(config: QuantizationConfig) -> Iterator[QuantizationConfig]:
    """Settings that take ever fewer bytes; the MLP loses bits first, as in the reference."""
    for mlp, attention, bigram in ((0, 0, 0), (1, 0, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2)):
        yield replace(
            config,
            prune_frac=max(config.prune_frac, SHRINK_PRUNING),
            mlp_bits=max(2, config.mlp_bits - mlp),
            attention_bits=max(2, config.attention_bits - attention),
            bigram_bits=max(2, config.bigram_bits - bigram),
        )


def storage_dtype(name: str, tensor: Tensor, model: TransformerConfig, config: QuantizationConfig) -> str:
    """The storage type of one tensor: int2 to int8, float16 or float32.

    Args:
        name: Key of the tensor in the state dict.
        tensor: Value of the tensor.
        model: The model it belongs to.
        config: Bits and exceptions.
    """
    fp16_keys = {f"blocks.{block % model.num_layers}.attention.k.weight" for block in config.fp16_key_blocks}
    is_small = tensor.numel() <= config.small_tensor or tensor.ndim == 0  # a number has no row to round
    if is_small or name == "token_embedding.weight" or name in fp16_keys:
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
