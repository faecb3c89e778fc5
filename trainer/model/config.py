"""The options of the model, and how a file gives them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from trainer.kernels.fusion import Fusion
from trainer.model.attention import AttentionConfig
from trainer.model.embedding import BigramConfig, SmearConfig
from trainer.model.mlp import MLPConfig

MAX_LAYERS, MAX_REPEATS = 1000, 16  # a file must not demand endless work


@dataclass(frozen=True)
class LoopConfig:
    """Depth recurrence: blocks that run more than once, with the same weights (openai/parameter-golf #1204).

    Args:
        repeats: How many more times the blocks run (1 to 16); null: no loop.
        first: First block of the loop (0 to last).
        last: Last block of the loop, itself included (at most num_layers - 1).
        start_frac: Share of the training after which the loop starts (0 to 1); steps before it are faster. A trained
            model always loops.
    """

    repeats: int | None = None
    first: int = 0
    last: int = 0
    start_frac: float = 0.0

    def __post_init__(self) -> None:
        if self.repeats is not None and not 1 <= self.repeats <= MAX_REPEATS:
            raise ValueError(f"model.loop.repeats must be between 1 and {MAX_REPEATS}, or be null, not {self.repeats}")
        if not 0 <= self.first <= self.last or not 0 <= self.start_frac < 1:
            raise ValueError(
                "model.loop.first must be between 0 and loop.last, and loop.start_frac in [0, 1), not "
                f"{self.first}, {self.last} and {self.start_frac}"
            )


@dataclass(frozen=True)
class TransformerConfig:
    """The whole model; the defaults are the reference recipe's 25,517,137 parameters.

    Args:
        vocab_size: Vocabulary size of the model, which must be that of the tokenizer (1 to 65,536).
        num_layers: Number of blocks (2 to 1,000); the first half passes its outputs to the second half, in the order
            they run.
        model_dim: Width of the residual stream (a multiple of twice the number of heads).
        attention: Attention of every block.
        mlp: MLP of every block.
        bigram: Hashed bigram embedding.
        smear: SmearGate, which mixes each position with the one before.
        loop: Depth recurrence.
        value_embedding_blocks: How many of the last blocks add an embedding of the token to their values, from one
            table for all of them (1 to num_layers); null: none (value embeddings, KellerJordan/modded-nanogpt).
        tied_embeddings: Use the token embedding as the output head too.
        embedding_init_std: Standard deviation of the initial token embedding (above 0).
        logit_softcap: Bound of the logits (above 0): they become softcap * tanh(logits / softcap).
        fused: Compute three parts with fused operators, written in Triton, in 16-bit precision: the MLP (on Hopper GPUs
            or newer), QK-norm, RoPE, key offset, XSA and gates (head widths that are a power of two), the loss
            (softcaps of at most 40). auto uses each where it runs, off uses none, on demands all three.
    """

    vocab_size: int = 1024
    num_layers: int = 10
    model_dim: int = 512
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    bigram: BigramConfig = BigramConfig()
    smear: SmearConfig = SmearConfig()
    loop: LoopConfig = LoopConfig()
    value_embedding_blocks: int | None = None
    tied_embeddings: bool = True
    embedding_init_std: float = 0.005
    logit_softcap: float = 30.0
    fused: Fusion = "auto"

    def __post_init__(self) -> None:
        heads = self.attention.num_heads
        if self.vocab_size < 1:
            raise ValueError(f"model.vocab_size must be at least 1, not {self.vocab_size}")
        if not 2 <= self.num_layers <= MAX_LAYERS:  # a single block has no other to pass its output to
            raise ValueError(f"model.num_layers must be between 2 and {MAX_LAYERS:,}, not {self.num_layers:,}")
        if self.model_dim < 1 or self.model_dim % (2 * heads):
            raise ValueError(f"model.model_dim {self.model_dim} does not give {heads} heads of an even width")
        if self.value_embedding_blocks is not None and not 1 <= self.value_embedding_blocks <= self.num_layers:
            raise ValueError(
                f"model.value_embedding_blocks must be between 1 and num_layers {self.num_layers}, or be null for "
                f"none, not {self.value_embedding_blocks}"
            )
        if self.loop.repeats and self.loop.last >= self.num_layers:
            raise ValueError(
                f"model.loop.last {self.loop.last} is not one of the {self.num_layers} blocks, counted from 0; set "
                "model.loop.repeats null for no loop"
            )
        if (self.attention.rope_dims or 0) > self.model_dim // heads:
            raise ValueError(
                f"model.attention.rope_dims {self.attention.rope_dims} is more than the head's "
                f"{self.model_dim // heads}"
            )
        if self.attention.key_offset:
            if self.attention.rope_dims in (None, self.model_dim // heads):
                raise ValueError(
                    f"model.attention.key_offset needs model.attention.rope_dims below the head's "
                    f"{self.model_dim // heads}, since it takes the channels that RoPE leaves alone"
                )
            if not any(map(self.attention.has_key_offset, range(self.num_layers))):
                raise ValueError(
                    "model.attention.key_offset needs a block with full attention; set model.attention.window null, or "
                    f"a window_pattern with L among its first {self.num_layers} letters"
                )
        for name, value in (
            ("model.attention.gate_dims", self.attention.gate_dims),
            ("model.smear.dims", self.smear.dims),
        ):
            if (value or 0) > self.model_dim:
                raise ValueError(f"{name} {value} is more than model_dim {self.model_dim}")
        if not self.logit_softcap > 0:
            raise ValueError(f"model.logit_softcap must be above 0, not {self.logit_softcap}")
        if not self.embedding_init_std > 0:
            raise ValueError(f"model.embedding_init_std must be positive, not {self.embedding_init_std}")

    def block_order(self, is_looped: bool = True) -> list[int]:
        """Numbers of the blocks in the order they run."""
        loop = self.loop
        if not (loop.repeats and is_looped):
            return list(range(self.num_layers))
        again = list(range(loop.first, loop.last + 1)) * loop.repeats
        return [*range(loop.last + 1), *again, *range(loop.last + 1, self.num_layers)]

    def has_value_embedding(self, block: int) -> bool:
        """Whether a block, counted from 0, adds an embedding of the token to its values."""
        return block >= self.num_layers - (self.value_embedding_blocks or 0)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads, number of key and value heads, and the width of a head."""
        attention = self.attention
        return attention.num_heads, attention.num_kv_heads, self.model_dim // attention.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain builtins, for a checkpoint or an artifact; without the choice of kernels, which is the machine's."""
        values = asdict(self)
        del values["attention"]["backend"], values["fused"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformerConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a key is unknown or a value does not fit.
        """
        groups: dict[str, Any] = {each.name: each.type for each in fields(cls) if is_dataclass(each.type)}
        try:
            _check_options(cls, {key: value for key, value in values.items() if key not in groups}, "", groups)
            for name, group in groups.items():
                _check_options(group, values.get(name, {}), f"{name}.")
            config = cls(**{key: groups[key](**value) if key in groups else value for key, value in values.items()})
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a model config: {error}") from error
        return config


def _check_options(config: Any, values: dict[str, Any], prefix: str, groups: Iterable[str] = ()) -> None:
    """Check the options that a file gives; one that is not off by default must be there.

    Args:
        config: Class of the options.
        values: Options by name.
        prefix: What comes before the names in errors.
        groups: Names that are no options.

    Raises:
        ValueError: If an option is unknown, missing, of another type or not finite.
    """
    options = {each.name: each for each in fields(config) if each.name not in groups}
    for name in sorted({*values, *options}, key=str):
        if name not in options:
            raise ValueError(f"this code has no option model.{prefix}{name}")
        option = options[name]
        if name not in values:
            if option.default not in (None, False, 0, "auto"):  # which is off, or the choice of the machine
                raise ValueError(f"model.{prefix}{name} is missing")
            continue
        value, allowed = values[name], get_args(option.type) or (option.type,)
        is_whole_float = float in allowed and type(value) is int
        if get_origin(option.type) is Literal:
            if value not in allowed:
                raise ValueError(f"model.{prefix}{name} must be one of {', '.join(allowed)}, not {value!r}")
        elif type(value) not in allowed and not is_whole_float:
            raise ValueError(f"model.{prefix}{name} must be {_words(allowed)}, not {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"model.{prefix}{name} must be finite, not {value!r}")


def _words(types: Iterable[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    return " or ".join(words[each] for each in types)
