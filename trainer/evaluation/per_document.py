"""The score of every document: sums that add up to the score of the whole text."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from trainer.data.tokenizer import BOS
from trainer.evaluation.metric import Score
from trainer.files import atomic_write

COLUMNS = ("document", "source", "tokens", "bytes", "nats", "evaluation")
PREFIXES = ('"document","source",', "document,source,")  # of such a file, today and before


def document_of_targets(tokens: Tensor) -> Tensor:
    """Number of the document that each target belongs to, counted from 0; a BOS belongs to the document it begins.

    Args:
        tokens: (n + 1,) of the text, any integer type.

    Returns:
        (n,) int64.
    """
    starts = tokens == BOS
    starts[0] = False  # the first document begins with the first token, whatever that is
    return starts.cumsum(0)[1:]


class DocumentScores(Metric):
    """Targets, bytes and nats of each document, summed over batches and processes."""

    full_state_update = False

    def __init__(self, documents: Tensor) -> None:
        """Start at zero.

        Args:
            documents: (n,) int64 of `document_of_targets`.
        """
        super().__init__()
        self.documents = documents
        count = int(documents[-1]) + 1
        self.nats: Tensor
        self.tokens: Tensor
        self.bytes: Tensor
        self.add_state("nats", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros(count, dtype=torch.int64), dist_reduce_fx="sum")
        self.to(documents.device)

    def update(self, positions: Tensor, nll: Tensor, num_bytes: Tensor, scored: Tensor) -> None:
        """Add targets.

        Args:
            positions: Number of each target in the text.
            nll: Nats of each, of the same shape.
            num_bytes: UTF-8 bytes of each, of the same shape.
            scored: bool, which of them count, of the same shape.
        """
        index = self.documents[positions].flatten()
        self.nats.index_add_(0, index, torch.where(scored, nll.double(), 0.0).flatten())
        self.tokens.index_add_(0, index, scored.long().flatten())
        self.bytes.index_add_(0, index, torch.where(scored, num_bytes, 0).flatten())

    def compute(self) -> tuple[list[int], list[int], list[float]]:
        """Tokens, bytes and nats of the documents."""
        return self.tokens.tolist(), self.bytes.tolist(), self.nats.tolist()


def total(tokens: Sequence[int], num_bytes: Sequence[int], nats: Sequence[float]) -> Score:
    """The score of documents together; the sum of their nats is rounded once."""
    sum_nats = math.fsum(nats)
    return Score(sum_nats / math.log(2) / sum(num_bytes), sum_nats / sum(tokens), sum(tokens), sum(num_bytes))


def write_csv(
    path: Path,
    sources: Sequence[str],
    evaluation: str,
    tokens: Sequence[int],
    num_bytes: Sequence[int],
    nats: Sequence[float],
) -> None:
    """Write a row for each document.

    Args:
        path: The file.
        sources: Where each document comes from; one that is not known is empty.
        evaluation: How all of them were scored, `EvaluationConfig.description`.
        tokens: Targets of each document.
        num_bytes: UTF-8 bytes of each.
        nats: Negative log-likelihood of each.

    Raises:
        UserError: If the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a source may hold a line end
    writer.writerow(COLUMNS)
    names = [*sources, *[""] * (len(tokens) - len(sources))]
    numbers = range(1, len(tokens) + 1)
    writer.writerows((*row, evaluation) for row in zip(numbers, names, tokens, num_bytes, nats, strict=False))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def by_source(
    sources: Sequence[str], tokens: Sequence[int], num_bytes: Sequence[int], nats: Sequence[float]
) -> list[tuple[str, int, Score]]:
    """Name, documents and score of each source, in the order in which they begin; none where there is only one."""
    chosen: dict[str, list[int]] = {}
    for index, name in enumerate(sources):
        if num_bytes[index]:
            chosen.setdefault(name, []).append(index)
    if len(chosen) < 2:
        return []
    rows = []
    for name, indices in chosen.items():
        columns = ([column[index] for index in indices] for column in (tokens, num_bytes, nats))
        rows.append((name, len(indices), total(*columns)))  # type: ignore[arg-type]
    return rows
