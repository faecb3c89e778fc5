"""Calibration: second moments of each matrix's inputs, and of the loss's gradients at its outputs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.attention_backends import SdpaBackend
from trainer.kernels.fusion import Fused
from trainer.model.layers import Linear
from trainer.model.transformer import Block, Transformer

EMBEDDING = "token_embedding.weight"


@dataclass
class Moments:
    """Moments of one matrix, (rows, cols).

    An error E of the matrix raises the loss by about half of sum_r sensitivity_r (E hessian E^T)_rr: the Fisher
    information in Kronecker form (K-FAC, Martens and Grosse 2015) with a diagonal second factor.

    Attributes:
        hessian: (cols, cols) float32, mean over positions of x x^T of its inputs.
        sensitivity: (rows,) float32, mean over positions of the squared gradient at its outputs, in nats per position.
    """

    hessian: Tensor
    sensitivity: Tensor


class _Sums:
    """Adds up the moments of one matrix over positions."""

    def __init__(self, weight: Tensor) -> None:
        rows, cols = weight.shape
        self.inputs = torch.zeros(cols, cols, device=weight.device)
        self.outputs = torch.zeros(rows, device=weight.device)

    def add(self, x: Tensor, y: Tensor, scale: Tensor | None = None) -> None:
        """Add a product y = scale * (W x) now, and its gradient once it is computed."""
        flat = x.detach().flatten(0, -2).float()
        with torch.autocast(flat.device.type, enabled=False):  # sums of squares overflow float16, and rounded to
            self.inputs += flat.mT @ flat  # bfloat16 they are no longer positive semi-definite

        def add_gradient(grad: Tensor) -> None:
            squares = grad.detach().flatten(0, -2).float().square().sum(0)
            self.outputs += squares if scale is None else squares * scale.detach().square()

        y.register_hook(add_gradient)

    def moments(self, positions: int) -> Moments:
        return Moments(self.inputs / positions, self.outputs / positions)


def calibrate(model: Transformer, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Run the model forward and backward, in the type of autocast where it is on.

    The tied embedding has two uses: as the head, and as the input embedding. Its Hessian adds the second to the first
    as a multiple of the identity; its sensitivity is per token.

    Args:
        model: The model; its kernels are set to plain ones, and no gradients remain.
        batches: (B, T + 1) tokens each, on the model's device; every token is the target of the one before.

    Returns:
        Moments by name of the weight, of all matrices in the blocks, the bigram projection, an untied head, and the
        tables of tokens and values.
    """
    model.set_kernels(SdpaBackend(), Fused())
    sums: dict[str, _Sums] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.head:
            sums[f"{name}.weight"] = matrix_sums = _Sums(module.weight)
            handles.append(module.register_forward_hook(_add_product(matrix_sums)))
    head = "head.weight" if model.head is not None else EMBEDDING
    weight = model.token_embedding.weight if model.head is None else model.head.weight
    sums[head] = _Sums(weight)
    tables = {EMBEDDING: model.token_embedding}
    if model.value_embedding is not None:
        tables["value_embedding.weight"] = model.value_embedding
    row_sums = {name: torch.zeros(len(table.weight), device=weight.device) for name, table in tables.items()}
    handles += [table.register_forward_hook(_add_lookup(row_sums[name])) for name, table in tables.items()]
    positions = 0
    try:
        _set_hooks(model, True)
        for tokens in batches:
            ids, targets = tokens[:, :-1], tokens[:, 1:].long()
            with torch.enable_grad():
                hidden = model.hidden(ids)
                logits = F.linear(hidden, weight.to(hidden.dtype))
                sums[head].add(hidden, logits)
                capped = model.softcap(logits).flatten(0, 1)
                F.cross_entropy(capped, targets.flatten(), reduction="sum").backward()
            positions += ids.numel()
            model.zero_grad()
    finally:
        _set_hooks(model, False)
        for handle in handles:
            handle.remove()
    moments = {name: total.moments(positions) for name, total in sums.items()}
    for name, table in tables.items():
        mean = row_sums[name] / positions
        if name in moments:
            moments[name] = _with_lookups(moments[name], mean)
        else:
            moments[name] = Moments(torch.eye(table.embedding_dim, device=weight.device), mean)
    return moments


def _add_lookup(row_sums: Tensor) -> Any:
    """A hook that adds the squared gradients of the rows that are looked up in a table, (rows,)."""

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        def add(grad: Tensor) -> None:
            row_sums.index_add_(0, inputs[0].flatten(), grad.float().square().mean(2).flatten())

        output.register_hook(add)

    return hook


def _add_product(sums: _Sums) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        sums.add(inputs[0], output, inputs[1] if len(inputs) > 1 else None)

    return hook


def _set_hooks(model: Transformer, enabled: bool) -> None:
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.has_hooks = enabled


def _with_lookups(head: Moments, lookups: Tensor) -> Moments:
    """Moments of the tied embedding: as the head, and as the input embedding."""
    mean = head.hessian.diagonal().mean()
    identity = torch.eye(len(head.hessian), device=head.hessian.device)
    hessian = head.hessian * head.sensitivity.mean() + identity * lookups.mean()
    sensitivity = (head.sensitivity * mean + lookups) / hessian.diagonal().mean()
    return Moments(hessian, sensitivity)
