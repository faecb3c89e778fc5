"""The language model: blocks with U-Net skips between a hashed-bigram embedding and a tied, softcapped head.

Source: openai/parameter-golf PR #560, a port of the record 2026-03-20_10L_Int5MLP_MuonWD04_SWA50.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.attention_backends import AttentionBackend, SdpaBackend
from trainer.kernels.fused_loss import softcapped_nll
from trainer.kernels.fusion import Fused
from trainer.kernels.windowed_attention import with_window
from trainer.model.attention import Attention, rotary_tables
from trainer.model.config import TransformerConfig
from trainer.model.embedding import BigramHash, SmearGate
from trainer.model.layers import Linear, activation_dtype, materialize, rms_norm
from trainer.model.mlp import MLP

MAX_LOGITS = 2**26  # computed at once where no kernel fuses the loss; each takes 12 bytes


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
