"""Pairs of tokens that the tokenizer never puts side by side, so that a model need not give them probability.

BPE merges adjacent pieces of a text, always those whose union has the highest score, until no union is in the
vocabulary. The merges inside two adjacent tokens of the result do not depend on the text around them, so whether one
token can follow another is known from these two alone. Source: Vieira et al. 2025, Language Models over Canonical
Byte-Pair Encodings (https://arxiv.org/abs/2506.07956), as conditioning of each token; KellerJordan/modded-nanogpt #350.
"""

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from trainer.errors import UserError

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class _States(NamedTuple):
    """Tokens at the moment of their own encoding when their outermost part is the same piece, one entry each.

    Attributes:
        tokens: The tokens.
        next_score: Score of the merge that they make next; -inf after the last.
        lowest: Lowest score of their merges so far; inf before the first.
        lowest_after: The same, with the next merge.
    """

    tokens: Array
    next_score: Array
    lowest: Array
    lowest_after: Array

    def below(self, score: float, is_left: bool) -> "_States":
        """Those whose next merge comes after a merge between the two tokens; of equal ones the leftmost is first."""
        is_later = self.next_score < score if is_left else self.next_score <= score
        return _States(*(each[is_later] for each in self))


def excluded_pairs(tokenizer: sentencepiece.SentencePieceProcessor) -> Tensor:
    """Which tokens never follow which.

    Args:
        tokenizer: A BPE tokenizer of SentencePiece.

    Returns:
        (V, V) bool: whether the second token never comes after the first. Control, unknown and byte tokens are in no
        such pair.

    Raises:
        UserError: If it is of another kind, or has symbols that its user defined.
    """
    size = tokenizer.get_piece_size()
    special = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_byte, tokenizer.is_unused)
    pieces = {tokenizer.id_to_piece(token): token for token in range(size) if not any(kind(token) for kind in special)}
    scores = {piece: float(tokenizer.get_score(token)) for piece, token in pieces.items()}
    # BPE numbers its pieces; other models store logarithms of probabilities, and symbols of the user have no number.
    if len(set(scores.values())) < len(scores) or not all(score.is_integer() for score in scores.values()):
        raise UserError(
            "eval.canonical: the tokenizer is not BPE, or has user-defined symbols, so which token can follow which is "
            "not known; leave eval.canonical out"
        )
    ends: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    starts: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for piece, token in pieces.items():
        parts, lowest = list(piece), float("inf")
        while True:
            unions = [scores.get(a + b, float("-inf")) for a, b in itertools.pairwise(parts)]
            best = max(unions, default=float("-inf"))
            state = (token, best, lowest, min(lowest, best))
            ends[parts[-1]].append(state)
            starts[parts[0]].append(state)
            if best == float("-inf"):
                break
            place, lowest = unions.index(best), state[-1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
    by_end, by_start = (
        {part: _States(*np.array(states).T) for part, states in each.items()} for each in (ends, starts)
    )
    excluded = np.zeros((size, size), dtype=bool)
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] not in by_end or piece[cut:] not in by_start:
                continue
            left, right = by_end[piece[:cut]].below(score, True), by_start[piece[cut:]].below(score, False)
            # Both are in these states at once: neither makes its next merge before the other's last one.
            meet = left.lowest[:, None] >= right.lowest_after
            meet &= right.lowest > left.lowest_after[:, None]
            rows, columns = meet.nonzero()
            excluded[left.tokens[rows].astype(int), right.tokens[columns].astype(int)] = True
    return torch.from_numpy(excluded)


def check_canonical(
    tokens: Tensor, excluded: Tensor, tokenizer: sentencepiece.SentencePieceProcessor, where: str, fix: str
) -> None:
    """Check that a text has no excluded pair, whose score would be infinite.

    Args:
        tokens: (n,) of the text, any integer type.
        excluded: (V, V) bool of `excluded_pairs`, on the same device.
        tokenizer: The tokenizer of both.
        where: What text it is, for the error.
        fix: What to do about it, for the error.

    Raises:
        UserError: If the text has one.
    """
    first, second = tokens[:-1].long(), tokens[1:].long()
    if (places := excluded[first, second].nonzero()).numel():
        a, b = (tokenizer.id_to_piece(int(each[places[0]])) for each in (first, second))
        raise UserError(f"{where}: has the token {b!r} after {a!r}, but BPE with this tokenizer never does; {fix}")
