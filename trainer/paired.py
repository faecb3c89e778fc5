"""Two models on the same documents: the difference in bits per byte, with an interval from a bootstrap."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.evaluation.per_document import COLUMNS

RESAMPLES = 10_000
SEED = 0
CHUNK = 2_000_000  # documents drawn at once, to bound memory
MOVED = 10  # documents that are listed
MANY = 30  # documents, below which an interval says little

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class DocumentTable:
    """A file of `trainer validate --per_document`.

    Attributes:
        path: The file.
        sources: Where each document comes from; may be empty.
        bytes: UTF-8 bytes of each document.
        bits: Negative log-likelihood of each document.
        evaluation: How they were scored.
    """

    path: Path
    sources: list[str]
    bytes: Floats
    bits: Floats
    evaluation: str

    @property
    def bpb(self) -> float:
        """Bits per byte of all documents together."""
        return float(self.bits.sum() / self.bytes.sum())


@dataclass(frozen=True)
class Paired:
    """The change from one model to another on the same documents.

    Attributes:
        before: Scores of the first model.
        after: Scores of the second model.
        low: Lower end of the 95 % interval of the change.
        high: Upper end.
        wins: Documents that the second model scores better.
        losses: Documents that it scores worse.
    """

    before: DocumentTable
    after: DocumentTable
    low: float
    high: float
    wins: int
    losses: int

    @property
    def change(self) -> float:
        """Change in bits per byte of all documents; below zero, the second model is better."""
        return self.after.bpb - self.before.bpb

    @property
    def changes(self) -> Floats:
        """Change in bits per byte of each document that has bytes."""
        has_bytes = self.before.bytes > 0
        return (self.after.bits - self.before.bits)[has_bytes] / self.before.bytes[has_bytes]

    def moved(self) -> list[int]:
        """Numbers, from 0, of the documents that moved the score most."""
        return np.argsort(-np.abs(self.after.bits - self.before.bits), kind="stable")[:MOVED].tolist()


def read_table(path: Path) -> DocumentTable:
    """Read a file of `trainer validate --per_document`.

    Raises:
        UserError: If it is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(
                    f"its columns are not {', '.join(COLUMNS)}; if an earlier version wrote it, write it again"
                )
            rows = list(reader)
        if any(None in row.values() for row in rows):
            raise ValueError("a row is truncated")
        if [row["document"] for row in rows] != [str(number) for number in range(1, len(rows) + 1)]:
            raise ValueError(f"its documents are not numbered from 1 to {len(rows)}")
        numbers = np.array([[float(row["bytes"]), float(row["nats"])] for row in rows]).reshape(-1, 2)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: is no file of trainer validate --per_document ({error})") from error
    if not np.isfinite(numbers).all() or (numbers < 0).any() or not numbers[:, 0].sum() > 0:
        raise UserError(f"{path}: holds no document with bytes, or invalid counts; write it again")
    sources, evaluation = [row["source"] for row in rows], rows[0]["evaluation"]
    return DocumentTable(path, sources, numbers[:, 0], numbers[:, 1] / math.log(2), evaluation)


def compare_documents(before: DocumentTable, after: DocumentTable) -> Paired:
    """Compare two models document by document, with a bootstrap over the documents.

    The percentile bootstrap of Efron, for a ratio of sums: documents are drawn with replacement, and the change is that
    of the drawn documents together.

    Raises:
        UserError: If the files are not of the same documents.
    """
    if len(before.bytes) != len(after.bytes):
        raise UserError(
            f"{after.path}: has {len(after.bytes):,} documents, but {before.path} has {len(before.bytes):,}; score the "
            "same text"
        )
    different = np.flatnonzero(before.bytes != after.bytes)
    if len(different):
        number = int(different[0])
        raise UserError(
            f"{after.path}: document {number + 1:,} has {after.bytes[number]:,.0f} bytes, but "
            f"{before.bytes[number]:,.0f} in {before.path}; score the same text"
        )
    differences = after.bits - before.bits
    low, high = np.percentile(resampled(differences, before.bytes), (2.5, 97.5))
    return Paired(before, after, float(low), float(high), int((differences < 0).sum()), int((differences > 0).sum()))


def resampled(differences: Floats, num_bytes: Floats) -> Floats:
    """Changes in bits per byte of documents that are drawn with replacement, (RESAMPLES,).

    Args:
        differences: Change of each document in bits.
        num_bytes: Its bytes.
    """
    random = np.random.default_rng(SEED)
    count = len(differences)
    rows = max(1, CHUNK // count)
    changes = []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(0, count, (min(rows, RESAMPLES - start), count))
        changes.append(differences[drawn].sum(1) / np.maximum(num_bytes[drawn].sum(1), 1.0))
    return np.concatenate(changes)


def sentences(paired: Paired) -> list[str]:
    """The comparison in words."""
    before, after = paired.before, paired.after
    pairs = enumerate(zip(before.sources, after.sources, strict=True), start=1)
    others = [(number, *pair) for number, pair in pairs if all(pair) and pair[0] != pair[1]]
    few = "" if len(before.bytes) >= MANY else ", too few for it to mean much"
    ways = [before.evaluation, after.evaluation]
    return [
        f"{before.path}: {before.bpb:.5f} bpb, {after.path}: {after.bpb:.5f} bpb, on {len(before.bytes):,} documents "
        f"with {before.bytes.sum():,.0f} bytes",
        f"change {paired.change:+.5f} bpb, 95 % interval {paired.low:+.5f} to {paired.high:+.5f} "
        f"(bootstrap over documents{few}); {paired.wins:,} better, {paired.losses:,} worse",
        *(
            f"warning: document {number:,} comes from {one} in the first file and from {two} in the second; is it the "
            "same text?"
            for number, one, two in others[:1]
        ),
        *(
            [f"warning: scored in two ways, {ways[0]} and {ways[1]}: the change is not that of the models alone"]
            if ways[0] != ways[1]
            else []
        ),
    ]


def moved_table(paired: Paired) -> list[list[str]]:
    """The documents that moved the score most, as cells; the first row names the columns."""
    before, after = paired.before, paired.after
    total = float((after.bits - before.bits).sum())
    rows = [["document", "source", "bytes", "before", "after", "change", "share of the change"]]
    for index in paired.moved():
        num_bytes, difference = before.bytes[index], after.bits[index] - before.bits[index]
        values = (before.bits[index], after.bits[index])
        scores = [f"{bits / num_bytes:.4f}" if num_bytes else "" for bits in values]
        change = f"{difference / num_bytes:+.4f}" if num_bytes else ""
        share = f"{100 * difference / total:+.1f} %" if total else ""
        rows.append([str(index + 1), before.sources[index], f"{num_bytes:,.0f}", *scores, change, share])
    return rows
