"""Documents packed into sequences: a sequence starts at a document, and none is cut that fits into one.

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
    """Rows of stretches of the token stream.

    Attributes:
        starts: (pieces,) first token of each piece, row after row.
        lengths: (pieces,) tokens of each piece.
        ends: (rows,) number of pieces up to and with each row's last.
        capacity: Places of a row.
    """

    starts: Positions
    lengths: Positions
    ends: Positions
    capacity: int

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def filled(self) -> float:
        """Share of the places in all rows that hold a token."""
        return float(self.lengths.sum() / (len(self) * self.capacity))

    def row(self, index: int) -> list[tuple[int, int]]:
        """Start and length of each piece of a row."""
        first = self.ends[index - 1] if index else 0
        pieces = slice(first, self.ends[index])
        return list(zip(self.starts[pieces].tolist(), self.lengths[pieces].tolist(), strict=True))


def document_starts(files: TokenFiles) -> Positions:
    """Position of every BOS, and of the first token; reads all tokens."""
    found = [np.zeros(1, dtype=np.int64)]
    for shard, end in zip(files.shards, files.ends, strict=True):
        for start in range(0, len(shard), READ_TOKENS):
            places = np.flatnonzero(shard[start : start + READ_TOKENS] == BOS)
            found.append(places + (int(end) - len(shard) + start))
    starts = np.concatenate(found)
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts


def pack(starts: Positions, total: int, sequence_length: int) -> Packing:
    """Put documents into rows of `sequence_length` + 1 tokens, each token of the stream into one row.

    A document longer than a row is cut into full rows and a rest; a rest stands behind the whole documents of its row.
    A row's first token, a BOS unless a long document goes on there, is the only one that is no target.

    Args:
        starts: (documents,) ascending.
        total: Tokens of the stream.
        sequence_length: Targets of a row.
    """
    capacity = sequence_length + 1
    lengths = np.diff(starts, append=total)
    parts = -(-lengths // capacity)  # of each document
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    piece_starts = np.repeat(starts, parts) + number * capacity
    piece_lengths = np.minimum(capacity, np.repeat(starts + lengths, parts) - piece_starts)
    falling = np.argsort(-piece_lengths, kind="stable")
    rows = np.empty(len(falling), dtype=np.int64)
    rows[falling] = _best_fit(np.bincount(piece_lengths, minlength=capacity + 1))
    order = np.lexsort((number > 0, rows))
    return Packing(piece_starts[order], piece_lengths[order], np.cumsum(np.bincount(rows)), capacity)


def _best_fit(histogram: Positions) -> Positions:
    """Rows for pieces in order of falling length: the fullest row that a piece fits into, else a new one.

    Args:
        histogram: (capacity + 1,) pieces of each length.

    Returns:
        (pieces,) row of each.
    """
    capacity = len(histogram) - 1
    count = 0
    spaces: dict[int, Positions] = {}  # rows by the tokens that still fit in
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
            place = bisect_left(sizes, length)
            if place == len(sizes):
                new = np.arange(count, count + -(-left // (capacity // length)))
                put(capacity, new)
                count += len(new)
                continue
            space = sizes[place]
            members = spaces.pop(space)
            del sizes[place]
            taken, rest = members[:left], members[left:]
            rows.append(taken)
            left -= len(taken)
            put(space, rest)
            put(space - length, taken)
    return np.concatenate(rows)
