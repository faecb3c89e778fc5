"""Packs documents into sequences: every sequence starts at a document, and no document that fits into one is cut.

Best-fit decreasing on a histogram of lengths, so that ten million documents take seconds. Sources: Krell et al. 2021
(packing by histogram, arXiv 2107.02027), Ding et al. 2024 (best fit instead of cutting, arXiv 2404.10830).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from trainer.data.shards import TokenFiles
from trainer.data.tokenizer import BOS

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]
READ_TOKENS = 16_000_000


@dataclass(frozen=True)
class Packing:
    """Rows made of segments of the token stream.

    Attributes:
        starts: (segments,) first token of each segment, row after row.
        lengths: (segments,) tokens of each segment.
        ends: (rows,) number of segments up to and including each row's last.
        capacity: Tokens that a row has room for.
    """

    starts: Positions
    lengths: Positions
    ends: Positions
    capacity: int

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def filled(self) -> float:
        """Share of the capacity of all rows that holds tokens."""
        return float(self.lengths.sum() / (len(self) * self.capacity))

    def row(self, index: int) -> list[tuple[int, int]]:
        """Start and length of each segment of a row."""
        first = self.ends[index - 1] if index else 0
        segments = slice(first, self.ends[index])
        return list(zip(self.starts[segments].tolist(), self.lengths[segments].tolist(), strict=True))


def document_starts(files: TokenFiles) -> Positions:
    """Position of every BOS, and of the first token; reads all tokens."""
    positions = [np.zeros(1, dtype=np.int64)]
    for shard, end in zip(files.shards, files.ends, strict=True):
        for start in range(0, len(shard), READ_TOKENS):
            offsets = np.flatnonzero(shard[start : start + READ_TOKENS] == BOS)
            positions.append(offsets + (int(end) - len(shard) + start))
    starts = np.concatenate(positions)
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts


def pack(starts: Positions, total: int, sequence_length: int) -> Packing:
    """Put documents into rows of `sequence_length` + 1 tokens, each token of the stream into one row.

    A document longer than a row is cut into full rows and a remainder, which follows the whole documents of its row. A
    row's first token, a BOS unless a long document continues there, is the only one that is not a target.

    Args:
        starts: (documents,) first token of each document, ascending.
        total: Tokens of the stream.
        sequence_length: Targets of a row.
    """
    capacity = sequence_length + 1
    lengths = np.diff(starts, append=total)
    parts = -(-lengths // capacity)  # of each document
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    segment_starts = np.repeat(starts, parts) + number * capacity
    segment_lengths = np.minimum(capacity, np.repeat(starts + lengths, parts) - segment_starts)
    descending = np.argsort(-segment_lengths, kind="stable")
    rows = np.empty(len(descending), dtype=np.int64)
    rows[descending] = _best_fit(np.bincount(segment_lengths, minlength=capacity + 1))
    order = np.lexsort((number > 0, rows))
    return Packing(segment_starts[order], segment_lengths[order], np.cumsum(np.bincount(rows)), capacity)


def _best_fit(histogram: Positions) -> Positions:
    """Rows for segments in order of descending length: the fullest row that a segment fits into, else a new one.

    Args:
        histogram: (capacity + 1,) number of segments of each length.

    Returns:
        (segments,) row of each.
    """
    capacity = len(histogram) - 1
    count = 0
    spaces: dict[int, Positions] = {}  # rows by the tokens that they still have room for
    sizes: list[int] = []  # its keys in order, for bisection
    rows: list[Positions] = []

    def put(space: int, members: Positions) -> None:
        if not len(members):
            return
        if space not in spaces:
            insort(sizes, space)
            spaces[space] = members
        else:
            spaces[space] = np.concatenate([spaces[space], members])

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            position = bisect_left(sizes, length)
            if position == len(sizes):
                new = np.arange(count, count + -(-left // (capacity // length)))
                put(capacity, new)
                count += len(new)
                continue
            space = sizes[position]
            members = spaces.pop(space)
            del sizes[position]
            filled, unused = members[:left], members[left:]
            rows.append(filled)
            left -= len(filled)
            put(space, unused)
            put(space - length, filled)
    return np.concatenate(rows)
