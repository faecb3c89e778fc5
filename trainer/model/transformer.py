"""The language model: blocks with U-Net skips between a hashed-bigram embedding and a tied, softcapped head.

Source: openai/parameter-golf PR #560, a port of the record 2026-03-20_10L_Int5MLP_MuonWD04_SWA50.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.attention_backends import AttentionBackend, SdpaBackend
from trainer.kernels.fused_loss import softcapped_nll
from trainer.kernels.fusion import Fused, Fusion
from trainer.kernels.windowed_attention import with_window
from trainer.model.attention import Attention, AttentionConfig, rotary_tables
from trainer.model.embedding import BigramConfig, BigramHash, SmearConfig, SmearGate
from trainer.model.layers import Linear, activation_dtype, materialize, rms_norm
from trainer.model.mlp import MLP, MLPConfig

MAX_LAYERS, MAX_REPEATS = 1000, 16  # a file must not demand endless work
MAX_LOGITS = 2**26  # computed at once where no kernel fuses the loss; each takes 12 bytes


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
        embedding_init_std: Standard deviation of the initial token embedding (at least 0).
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
        if not self.embedding_init_std >= 0:
            raise ValueError(f"model.embedding_init_std must be at least 0, not {self.embedding_init_std}")

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


class Block(nn.Module):
    """Mix in the input embedding, then attention, then the MLP, each scaled per channel."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        dim = config.model_dim
        attention = config.attention
        self.attention = Attention(attention, dim, config.has_value_embedding(index), attention.has_key_offset(index))
        self.mlp = MLP(config.mlp, dim)
        self.mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.attention_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))

    def forward(
        self, x: Tensor, x0: Tensor, rotary: Tensor, start_pos: int = 0, value_embeddings: Tensor | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T - start_pos, D).

        Args:
            x: (B, T, D), the residual stream.
            x0: (B, T, D), the model's input embedding.
            rotary: (2, T, d) of `rotary_tables`.
            start_pos: First position whose output is wanted.
            value_embeddings: (B, T, K, d) of `Transformer.value_embeddings`.
        """
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x[:, start_pos:] + self.attention(rms_norm(x), rotary, self.attention_scale, start_pos, value_embeddings)
        return x + self.mlp(rms_norm(x), self.mlp_scale)


class Transformer(nn.Module):
    """The model. `forward` gives logits, `nll` the loss of each target; both run the same blocks."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build and initialize the model.

        Args:
            config: Its sizes and options.
        """
        super().__init__()
        self.config = config
        dim = config.model_dim
        self.token_embedding = nn.Embedding(config.vocab_size, dim)
        buckets = config.bigram.buckets
        self.bigram = BigramHash(buckets, config.bigram, dim) if buckets else None
        self.smear = SmearGate(config.smear, dim)
        _, kv_heads, head_dim = config.heads
        has_values = config.value_embedding_blocks is not None
        self.value_embedding = nn.Embedding(config.vocab_size, kv_heads * head_dim) if has_values else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(len(config.block_order()) // 2, dim))
        self.is_looped = True
        self.head = None if config.tied_embeddings else Linear(dim, config.vocab_size)
        self.set_kernels(SdpaBackend(), Fused())
        self._initialize()

    def _initialize(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=self.config.embedding_init_std)
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.table.weight)
            nn.init.orthogonal_(self.bigram.proj.weight, gain=1 / math.sqrt(2 * self.config.num_layers))
        if self.value_embedding is not None:
            nn.init.zeros_(self.value_embedding.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            for matrix in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
                nn.init.orthogonal_(matrix.weight)
            for matrix in (block.attention.out, block.mlp.down):
                nn.init.zeros_(matrix.weight)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def set_kernels(self, attention: AttentionBackend, fused: Fused) -> None:
        """Use one attention backend, with the window of each block, and these fused operators."""
        self.has_fused_loss = fused.loss
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            window = self.config.attention.window_of(index)
            block.attention.backend = with_window(attention, window) if window else attention
            block.attention.is_fused = fused.heads
            block.mlp.is_fused = fused.mlp

    def hidden(self, ids: Tensor, start_pos: int = 0) -> Tensor:
        """Final normalized states.

        Args:
            ids: (B, T) tokens, any integer type.
            start_pos: First position that is wanted; the last block computes only keys and values before it.

        Returns:
            (B, T - start_pos, D), in autocast's type where it is on.
        """
        return self.states(self.embed(ids), self.rotary(ids.size(1), ids.device), start_pos, self.value_embeddings(ids))

    def rotary(self, length: int, device: torch.device) -> Tensor:
        """Tables of `rotary_tables` for the positions 0 to length - 1."""
        attention = self.config.attention
        return rotary_tables(length, self.config.heads[2], attention.rope_base, device, attention.rope_dims)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embedding of tokens, (B, T) to (B, T, D); a position depends on its token and the two before."""
        dtype = activation_dtype(self.token_embedding.weight)
        ids = ids.to(torch.int32)
        x = self.token_embedding(ids).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, dtype)
        x = self.smear(rms_norm(x), ids)
        # Every block reads it. A per-channel gate makes it from two tensors that are stored anyway, so each compiled
        # kernel of the backward pass would recompute it; a per-token gate takes a sum, which is not recomputed.
        is_recomputed = torch.compiler.is_compiling() and torch.is_grad_enabled() and self.smear.scale is None
        return materialize(x) if is_recomputed else x

    def value_embeddings(self, ids: Tensor) -> Tensor | None:
        """What the tokens add to the values of the last blocks, (B, T) to (B, T, K, d)."""
        if self.value_embedding is None:
            return None
        dtype = activation_dtype(self.value_embedding.weight)
        return self.value_embedding(ids.to(torch.int32)).to(dtype).unflatten(2, (-1, self.config.heads[2]))

    def states(self, x0: Tensor, rotary: Tensor, start_pos: int = 0, value_embeddings: Tensor | None = None) -> Tensor:
        """Run the blocks.

        Args:
            x0: (B, T, D) of `embed`.
            rotary: (2, T, d) of `rotary_tables`, for the positions of `x0`.
            start_pos: First position that is wanted.
            value_embeddings: (B, T, K, d) of `value_embeddings`.

        Returns:
            (B, T - start_pos, D), normalized.
        """
        x = x0
        skips: list[Tensor] = []
        order = self.config.block_order(self.is_looped)
        num_skips = len(order) // 2
        for index, number in enumerate(order):
            skip = index - (len(order) - num_skips)
            if skip >= 0:
                x = x + self.skip_weights[skip].to(x.dtype) * skips.pop()
            is_last = index == len(order) - 1
            x = self.blocks[number](x, x0, rotary, start_pos if is_last else 0, value_embeddings)
            if index < num_skips:
                skips.append(x)
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped logits of final states, (..., D) to (..., V), at least float32."""
        return self.softcap(self._uncapped_logits(hidden))

    def _uncapped_logits(self, hidden: Tensor) -> Tensor:
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight.to(hidden.dtype))

    def softcap(self, logits: Tensor) -> Tensor:
        """Bound logits, in at least float32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token at every position, (B, T) to (B, T, V)."""
        return self.logits(self.hidden(ids))

    def nll(self, ids: Tensor, targets: Tensor, start_pos: int = 0, excluded: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each target in nats.

        Args:
            ids: (B, T) tokens.
            targets: (B, T) tokens that follow them.
            start_pos: First position that is scored.
            excluded: (V, V) bool: tokens that have no probability after a token.

        Returns:
            (B, T - start_pos), at least float32.
        """
        hidden = self.hidden(ids, start_pos).flatten(0, 1)
        targets = targets[:, start_pos:].long()
        ids = ids[:, start_pos:].flatten()
        if self.has_fused_loss:
            logits = self._uncapped_logits(hidden)
            previous = None if excluded is None else ids
            nll = softcapped_nll(logits, targets.flatten(), self.config.logit_softcap, previous, excluded)[0]
        elif torch.compiler.is_compiling() or torch.is_grad_enabled():
            nll = self._cross_entropy(hidden, targets.flatten(), ids, excluded)
        else:
            rows = max(1, MAX_LOGITS // self.config.vocab_size)
            chunks = zip(hidden.split(rows), targets.flatten().split(rows), ids.split(rows), strict=True)
            nll = torch.cat([self._cross_entropy(*chunk, excluded) for chunk in chunks])
        return nll.view_as(targets)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, ids: Tensor, excluded: Tensor | None) -> Tensor:
        logits = self.logits(hidden)
        if excluded is not None:
            logits = logits.masked_fill(excluded[ids.long()], float("-inf"))
        return F.cross_entropy(logits, targets, reduction="none")
