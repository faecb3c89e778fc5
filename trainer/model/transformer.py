"""The language model: ten blocks with U-Net skips between a hashed-bigram embedding and a tied, softcapped head.

Source: openai/parameter-golf PR #560, a port of the record 2026-03-20_10L_Int5MLP_MuonWD04_SWA50.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention import Attention, AttentionConfig, rotary_tables
from trainer.model.attention_kernel import AttentionKernel, SdpaKernel
from trainer.model.banded_attention import with_window
from trainer.model.embedding import BigramConfig, BigramHash, SmearGate
from trainer.model.fused_loss import softcapped_nll
from trainer.model.fusion import Fused, Fusion
from trainer.model.layers import Linear, activation_dtype, kept, rms_norm
from trainer.model.mlp import MLP, MLPConfig

MOST_REPEATS = 16  # a file must not ask for endless work
LOGITS_AT_ONCE = 2**26  # where nothing fuses the loss, each takes 12 bytes


@dataclass(frozen=True)
class LoopConfig:
    """Blocks that run more than once, with the same weights (depth recurrence, openai/parameter-golf #1204).

    Args:
        first: First block of the loop, counted from 0.
        last: Last block of it.
        repeats: How many more times they run; 0: no loop.
        start_frac: Share of the training's time or steps after which they do; what comes before is faster. A model that
            is used always loops.
    """

    first: int = 0
    last: int = 0
    repeats: int = 0
    start_frac: float = 0.0


@dataclass(frozen=True)
class TransformerConfig:
    """The whole model; the defaults are the reference recipe's 25,517,137 parameters.

    Args:
        vocab_size: Pieces of the tokenizer.
        num_layers: Blocks; the first half passes its outputs to the second half, in the order they run.
        model_dim: Width of the residual stream.
        attention: Attention of every block.
        mlp: MLP of every block.
        bigram: Hashed bigram embedding.
        smear_dims: Channels that the gate to the token before looks at; 0: one gate a channel, the same for all tokens.
        layer_norm_scale: Divide what block i reads by sqrt(i + 1), counted from 0 (LayerNorm Scaling, Sun et al. 2025).
        parallel_from: First block whose MLP reads the same input as its attention; null: none (parallel residuals,
            Wang and Komatsuzaki 2021).
        loop: Blocks that run more than once.
        value_blocks: So many of the last blocks add to their values an embedding of the token, from one table for all
            of them (value embeddings, KellerJordan/modded-nanogpt).
        tied_embeddings: Use the token embedding as the output head too.
        embedding_init_std: Standard deviation of the token embedding at the start.
        logit_softcap: Logits become softcap * tanh(logits / softcap).
        fused: Compute three parts by operators of their own, in Triton and 16-bit precision: the MLP (on Hopper GPUs or
            newer), what happens to heads (of a width that is a power of two), the loss (with a softcap of at most 40).
            auto uses each where it runs, off none.
    """

    vocab_size: int = 1024
    num_layers: int = 10
    model_dim: int = 512
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    bigram: BigramConfig = BigramConfig()
    smear_dims: int = 0
    layer_norm_scale: bool = False
    parallel_from: int | None = None
    loop: LoopConfig = LoopConfig()
    value_blocks: int = 0
    tied_embeddings: bool = True
    embedding_init_std: float = 0.005
    logit_softcap: float = 30.0
    fused: Fusion = "auto"

    def __post_init__(self) -> None:
        heads, kv_heads = self.attention.num_heads, self.attention.num_kv_heads
        for name, value, least in (
            ("vocab_size", self.vocab_size, 1),
            ("num_layers", self.num_layers, 2),
            ("num_heads", heads, 1),
        ):
            if value < least:  # one block has no other to pass its output to
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.model_dim % (2 * heads):
            raise ValueError(f"model_dim {self.model_dim} does not give {heads} heads of an even width")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"num_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
        if not 0 <= self.value_blocks <= self.num_layers:
            raise ValueError(
                f"value_blocks must lie between 0 and num_layers {self.num_layers}, not {self.value_blocks}"
            )
        loop = self.loop
        if not 0 <= loop.first <= loop.last < self.num_layers:
            raise ValueError(f"loop: there are no blocks {loop.first} to {loop.last} among {self.num_layers}")
        if not 0 <= loop.repeats <= MOST_REPEATS or not 0 <= loop.start_frac < 1:
            raise ValueError(
                f"loop: repeats must lie between 0 and {MOST_REPEATS} and start_frac in [0, 1), not {loop.repeats} and "
                f"{loop.start_frac}"
            )
        rope = self.attention.rope_dims
        if rope is not None and (rope < 2 or rope % 2 or rope > self.model_dim // heads):
            raise ValueError(
                f"attention.rope_dims must be even, from 2 to the head's {self.model_dim // heads}, not {rope}"
            )
        for name, number in (("window", self.attention.window), ("full_every", self.attention.full_every)):
            if number is not None and number < 1:
                raise ValueError(f"attention.{name} must be at least 1, not {number}")
        for name, value in (("attention.gate_dims", self.attention.gate_dims), ("smear_dims", self.smear_dims)):
            if not 0 <= value <= self.model_dim:
                raise ValueError(f"{name} must lie between 0 and model_dim {self.model_dim}, not {value}")
        if self.bigram.buckets < 2 and self.bigram.buckets != 0:
            raise ValueError(f"bigram.buckets must be 0 or at least 2, not {self.bigram.buckets}")
        for name, value in (("mlp.ratio", self.mlp.ratio), ("bigram.dim", self.bigram.dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.embedding_init_std < 0:
            raise ValueError(f"embedding_init_std must not be negative, but {self.embedding_init_std} is")

    def order(self, looped: bool = True) -> list[int]:
        """Blocks in the order they run."""
        loop = self.loop
        again = list(range(loop.first, loop.last + 1)) * (loop.repeats if looped else 0)
        return [*range(loop.last + 1), *again, *range(loop.last + 1, self.num_layers)]

    def has_token_values(self, block: int) -> bool:
        """Whether a block, counted from 0, adds an embedding of the token to its values."""
        return block >= self.num_layers - self.value_blocks

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads, and the width of a head."""
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
        parts = {"attention": AttentionConfig, "mlp": MLPConfig, "bigram": BigramConfig, "loop": LoopConfig}
        try:
            config = cls(**{key: parts[key](**value) if key in parts else value for key, value in values.items()})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a model config: {error}") from error
        for part in (config, config.attention, config.mlp, config.bigram, config.loop):
            for each in fields(part):
                value, allowed = getattr(part, each.name), get_args(each.type) or (each.type,)
                if int in allowed and type(value) not in allowed:
                    raise ValueError(f"not a model config: {each.name} must be a whole number, not {value!r}")
        return config


class Block(nn.Module):
    """Mix in the input embedding, then attention, then the MLP, each scaled per channel."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        dim = config.model_dim
        self.input_scale = 1 / math.sqrt(index + 1) if config.layer_norm_scale else None
        self.is_parallel = config.parallel_from is not None and index >= config.parallel_from
        self.attention = Attention(config.attention, dim, config.has_token_values(index))
        self.mlp = MLP(config.mlp, dim)
        self.mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.attention_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))

    def forward(
        self, x: Tensor, x0: Tensor, rotary: Tensor, first: int = 0, token_values: Tensor | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T - first, D); `x0` is the model's input embedding, for the others see Attention."""
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        kept, read = x[:, first:], self._read(x)
        x = kept + self.attention(read, rotary, self.attention_scale, first, token_values)
        return x + self.mlp(read[:, first:] if self.is_parallel else self._read(x), self.mlp_scale)

    def _read(self, x: Tensor) -> Tensor:
        return rms_norm(x) if self.input_scale is None else self.input_scale * rms_norm(x)


class Transformer(nn.Module):
    """The model. `forward` gives logits, `nll` the loss of each target; both run the same blocks."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build and initialise the model.

        Args:
            config: All of its sizes.
        """
        super().__init__()
        self.config = config
        dim = config.model_dim
        self.token_embedding = nn.Embedding(config.vocab_size, dim)
        self.bigram = BigramHash(config.bigram, dim) if config.bigram.buckets else None
        self.smear = SmearGate(dim, config.smear_dims)
        _, kv_heads, width = config.heads
        self.value_embedding = nn.Embedding(config.vocab_size, kv_heads * width) if config.value_blocks else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(len(config.order()) // 2, dim))
        self.is_looped = True
        self.head = None if config.tied_embeddings else Linear(dim, config.vocab_size)
        self.set_kernels(SdpaKernel(), Fused())
        self._initialise()

    def _initialise(self) -> None:
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

    def set_kernels(self, attention: AttentionKernel, fused: Fused) -> None:
        """Use one way of computing attention, with each block's window, and these operators for the rest."""
        self.has_fused_loss = fused.loss
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            window = self.config.attention.window_of(index)
            block.attention.kernel = with_window(attention, window) if window else attention
            block.attention.is_fused = fused.heads
            block.mlp.is_fused = fused.mlp

    def hidden(self, ids: Tensor, first: int = 0) -> Tensor:
        """Final normalised states.

        Args:
            ids: (B, T) tokens, any integer type.
            first: First position that is wanted; the last block computes only keys and values before it.

        Returns:
            (B, T - first, D), in autocast's type where it is on.
        """
        return self.states(self.embed(ids), self.rotary(ids.size(1), ids.device), first, self.token_values(ids))

    def rotary(self, length: int, device: torch.device) -> Tensor:
        """Tables of `rotary_tables` for positions from 0 on."""
        attention = self.config.attention
        return rotary_tables(length, self.config.heads[2], attention.rope_base, device, attention.rope_dims)

    def embed(self, ids: Tensor) -> Tensor:
        """What the tokens bring in, (B, T) to (B, T, D); a position looks at its token and the two before."""
        dtype = activation_dtype(self.token_embedding.weight)
        ids = ids.to(torch.int32)
        x = self.token_embedding(ids).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, dtype)
        x = self.smear(rms_norm(x), ids)
        # Every block reads it. From two tensors that are kept anyway, each compiled kernel of the backward pass would
        # compute it again; a gate that looks at the token takes a sum, which is not repeated.
        is_repeated = torch.compiler.is_compiling() and torch.is_grad_enabled() and not self.config.smear_dims
        return kept(x) if is_repeated else x

    def token_values(self, ids: Tensor) -> Tensor | None:
        """What the tokens add to the values of the last blocks, (B, T) to (B, T, K, d)."""
        if self.value_embedding is None:
            return None
        dtype = activation_dtype(self.value_embedding.weight)
        return self.value_embedding(ids.to(torch.int32)).to(dtype).unflatten(2, (-1, self.config.heads[2]))

    def states(self, x0: Tensor, rotary: Tensor, first: int = 0, token_values: Tensor | None = None) -> Tensor:
        """Run the blocks.

        Args:
            x0: (B, T, D) of `embed`.
            rotary: (2, T, d) of `rotary_tables`, for the positions of `x0`.
            first: First position that is wanted.
            token_values: Of `token_values`.

        Returns:
            (B, T - first, D), normalised.
        """
        x = x0
        skips: list[Tensor] = []
        order = self.config.order(self.is_looped)
        num_skips = len(order) // 2
        for index, place in enumerate(order):
            reached = index - (len(order) - num_skips)
            if reached >= 0:
                x = x + self.skip_weights[reached].to(x.dtype) * skips.pop()
            x = self.blocks[place](x, x0, rotary, first if index == len(order) - 1 else 0, token_values)
            if index < num_skips:
                skips.append(x)
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped logits of final states, (..., D) to (..., V), at least float32."""
        return self.softcap(self._uncapped(hidden))

    def _uncapped(self, hidden: Tensor) -> Tensor:
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight.to(hidden.dtype))

    def softcap(self, logits: Tensor) -> Tensor:
        """Bound logits, in at least float32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token at every position, (B, T) to (B, T, V)."""
        return self.logits(self.hidden(ids))

    def nll(self, ids: Tensor, targets: Tensor, first: int = 0) -> Tensor:
        """Negative log-likelihood of each target in nats.

        Args:
            ids: (B, T) tokens.
            targets: (B, T) tokens that follow them; -1 costs nothing.
            first: First position that is scored.

        Returns:
            (B, T - first), at least float32.
        """
        hidden = self.hidden(ids, first).flatten(0, 1)
        targets = targets[:, first:].long()
        if self.has_fused_loss:
            nll = softcapped_nll(self._uncapped(hidden), targets.flatten(), self.config.logit_softcap)[0]
        elif torch.compiler.is_compiling() or torch.is_grad_enabled():
            nll = self._cross_entropy(hidden, targets.flatten())
        else:
            rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
            parts = zip(hidden.split(rows), targets.flatten().split(rows), strict=True)
            nll = torch.cat([self._cross_entropy(*part) for part in parts])
        return nll.view_as(targets)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), targets, ignore_index=-1, reduction="none")
