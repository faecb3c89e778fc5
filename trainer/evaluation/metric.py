"""Bits per byte as a torchmetrics metric: float64 sums that add up over batches and processes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Score(NamedTuple):
    """The result of an evaluation.

    Attributes:
        bpb: Bits per UTF-8 byte.
        loss: Nats per token.
        tokens: Number of targets scored.
        bytes: UTF-8 bytes of their text.
    """

    bpb: float
    loss: float
    tokens: int
    bytes: int

    def line(self) -> str:
        """One line that a script can parse."""
        return f"val_bpb={self.bpb:.8f} val_loss={self.loss:.8f} tokens={self.tokens} bytes={self.bytes}"


class BitsPerByte(Metric):
    """Sum of negative log-likelihoods over sum of bytes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.nll: Tensor
        self.tokens: Tensor
        self.bytes: Tensor
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, num_bytes: Tensor, scored: Tensor) -> None:
        """Add targets.

        Args:
            nll: Nats of each target.
            num_bytes: UTF-8 bytes of each target, of the same shape.
            scored: bool, which of them count, of the same shape.
        """
        self.nll += torch.where(scored, nll.double(), 0.0).sum()
        self.tokens += scored.sum()
        self.bytes += torch.where(scored, num_bytes, 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Bits per byte, nats per token, and the two counts."""
        return {
            "bpb": self.nll / math.log(2) / self.bytes,
            "loss": self.nll / self.tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }

    def score(self) -> Score:
        """`compute`, as plain numbers."""
        values = self.compute()
        return Score(float(values["bpb"]), float(values["loss"]), int(values["tokens"]), int(values["bytes"]))
