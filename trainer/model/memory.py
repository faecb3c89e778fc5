"""How much memory a training step takes, before it is made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.kernels.fusion import Fused
from trainer.model.config import TransformerConfig

# float32 copies of the weights: themselves, gradients, two moments, the average, the update in the making.
COPIES = 6


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training step.

    Attributes:
        fixed: Bytes of weights, gradients, optimizer state and average.
        per_token: Bytes that the backward pass needs of each token of a micro-batch.
    """

    fixed: int
    per_token: int

    def total(self, micro_batch_tokens: int) -> int:
        """Bytes at the peak."""
        return self.fixed + self.per_token * micro_batch_tokens

    def largest(self, sequences: int, length: int, available: int) -> int | None:
        """Tokens of the largest equal part of a step that fits, in whole sequences; None if not even one does.

        Args:
            sequences: Sequences of a step on this device.
            length: Tokens of a sequence.
            available: Bytes of memory.
        """
        parts = [sequences // count * length for count in range(1, sequences + 1) if sequences % count == 0]
        return next((tokens for tokens in parts if self.total(tokens) <= available), None)


def training_memory(config: TransformerConfig, parameters: int, fused: Fused, itemsize: int) -> TrainingMemory:
    """Count what the compiled backward pass keeps: the operands of every matrix product and of every fused operator.

    Norms, gates and other element-wise work are computed again, unless a fused operator reads their result.

    Args:
        config: The model.
        parameters: Number of its parameters.
        fused: The fused operators that run.
        itemsize: Bytes of one activation: 2 in 16-bit precision, else 4.
    """
    dim = config.model_dim
    heads, kv_heads, head_dim = config.heads
    attention = config.attention
    queries, keys = heads * head_dim, kv_heads * head_dim
    block = (
        4 * dim  # the residual stream before attention and before the MLP, and its norms
        + (queries + 2 * keys)  # before QK-norm
        + 3 * queries  # queries, keys and values as attention reads them; most kernels expand keys and values
        + queries  # its output
        + (queries if attention.xsa else 0)
        + (2 * queries if attention.gate_dims else 0)
        + config.mlp.ratio * dim * (1 if fused.mlp else 2)
    )  # fmt: skip
    embedding = 2 * dim + (config.bigram.dim if config.bigram.buckets else 0)
    # Logits and their gradient; without the fused loss, in float32 besides.
    logits = config.vocab_size * (2 * itemsize if fused.loss else 3 * itemsize + 4)
    blocks = len(config.block_order()) * (block * itemsize + 4 * heads)  # with the log-sum-exp of each head
    gradients = dim * (4 + 2 * itemsize) + config.mlp.ratio * dim * itemsize  # of the block at work
    return TrainingMemory(4 * COPIES * parameters, blocks + embedding * itemsize + logits + gradients)


def saved_bytes(compute: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that the backward pass of an uncompiled model needs of its activations.

    Args:
        compute: Runs the forward pass.
        model: Its weights are not counted.
    """
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = compute()  # the graph holds what is counted, so that no two storages have one address
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    del kept
    return sum(size for address, size in storages.items() if address not in weights)
