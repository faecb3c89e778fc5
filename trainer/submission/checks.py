"""What a judge would check of a submission: causality, normalization, the bytes of the text, and the splits."""

from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from trainer.data.canonical import excluded_pairs
from trainer.data.case_markup import SPACE
from trainer.data.manifest import MANIFEST, Manifest, documents_of, verify
from trainer.data.shards import TokenArray, TokenFiles
from trainer.data.sources import Shards
from trainer.data.tokenizer import BOS
from trainer.errors import UserError
from trainer.loading import load_artifact
from trainer.model.transformer import Transformer

TOLERANCE = 1e-4  # of logits and of a sum of probabilities, in float32
CONTEXT = 128  # tokens of the text that causality is checked on
PREFIX = 16  # tokens before the position whose probabilities are added up
ROWS = 1024  # sequences scored at once


def check(artifact: Path, data: Path, val_tokens: int, val_bytes: int, canonical: bool) -> list[str]:
    """Check a submission; each check gives a line.

    Args:
        artifact: The artifact, with its tokenizer beside it.
        data: Folder of the shards.
        val_tokens: Number of targets that were scored.
        val_bytes: Bytes that their text was taken to have.
        canonical: Whether they were scored with `eval.canonical`.

    Raises:
        UserError: If a check fails.
    """
    text = Shards(str(data)).prepared()
    model, tokenizer = load_artifact(artifact)
    tokens = TokenFiles(text.val).read(0, val_tokens + 1)
    start = torch.from_numpy(tokens[: CONTEXT + 1].astype(np.int64))
    counted = count_bytes(tokenizer, tokens)
    if counted != val_bytes:
        raise UserError(f"{data}: the scored text has {counted:,} bytes, but the run counted {val_bytes:,}")
    return [
        check_causality(model, start),
        check_normalization(model, start, excluded_pairs(tokenizer) if canonical else None),
        f"bytes: {counted:,}, counted again by decoding the text",
        check_splits(data),
    ]


@torch.no_grad()
def check_causality(model: Transformer, tokens: Tensor) -> str:
    """Replace everything after a position: no logit up to it may change.

    Args:
        model: In evaluation mode.
        tokens: (n,) of a text.

    Raises:
        UserError: If one does.
    """
    ids = tokens[None]
    logits = model(ids)
    worst = 0.0
    for end in {max(1, len(tokens) // 4), max(1, len(tokens) // 2), len(tokens) - 1}:
        changed = ids.clone()
        changed[:, end:] = (changed[:, end:] + 1) % model.config.vocab_size
        worst = max(worst, float((model(changed) - logits)[:, :end].abs().max()))
    if not worst <= TOLERANCE:
        raise UserError(f"the model sees the future: later tokens change earlier logits by {worst:.1e}")
    return f"causal: tokens after a position change no logit before it (at most {worst:.0e})"


@torch.no_grad()
def check_normalization(model: Transformer, tokens: Tensor, excluded: Tensor | None = None) -> str:
    """Add up the probabilities of all tokens at one position, each as a text with that token is scored.

    Args:
        model: In evaluation mode.
        tokens: (n,) of a text.
        excluded: (V, V) bool of `excluded_pairs`, which get no probability.

    Raises:
        UserError: If the sum is not 1.
    """
    prefix = tokens[: min(PREFIX, len(tokens))]
    vocab_size = model.config.vocab_size
    total = torch.zeros((), dtype=torch.float64)
    for candidates in torch.arange(vocab_size).split(ROWS):
        ids = prefix.expand(len(candidates), -1)
        targets = torch.cat((ids[:, 1:], candidates[:, None]), dim=1)
        total += (-model.nll(ids, targets, len(prefix) - 1, excluded).double()).exp().sum()
    if not abs(float(total) - 1) <= TOLERANCE:
        raise UserError(f"the probabilities of all {vocab_size:,} tokens add up to {float(total):.6f}, not to 1")
    return f"normalized: the probabilities of all {vocab_size:,} tokens add up to {float(total):.6f}"


def count_bytes(tokenizer: sentencepiece.SentencePieceProcessor, tokens: TokenArray) -> int:
    """UTF-8 bytes of the text of all tokens but the first, by decoding it: no table of bytes is used."""
    total = 0
    if len(tokens) and tokens[0] != BOS:  # the first token is context only
        tokens = np.concatenate((np.array([BOS], dtype=tokens.dtype), tokens[1:]))
    for document in documents_of(tokens):
        ids = document.tolist()
        while ids and tokenizer.is_byte(ids[-1]):  # a character may be cut where the scored part ends
            ids.pop()
            total += 1
        total += len(tokenizer.decode(ids).replace(SPACE, " ").encode())
    return total


def check_splits(data: Path) -> str:
    """Whether a document is in both splits, as far as a manifest tells which documents there are.

    Raises:
        UserError: If one is, or the shards are not those of the manifest.
    """
    if Manifest.read(data) is None:
        return f"splits: not checked, {data} has no {MANIFEST}"
    manifest = verify(data)
    count = sum(shard.documents for shard in manifest.shards)
    return f"splits: none of the {count:,} documents is both in training and in validation text"
