"""The SentencePiece tokenizer, and how many UTF-8 bytes of text each token stands for."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from trainer.data.case_markup import (
    DELIMITER,
    MARK,
    SPACE,
    CaseMarkupProcessor,
    has_case_markup,
    training_text,
    without_paths,
    write_rules,
)
from trainer.data.shards import MAX_VOCAB, TokenArray
from trainer.errors import UserError
from trainer.files import cannot_read

BOS = 1
BEGIN = np.array([BOS], dtype=np.uint16)
MIN_VOCAB = 261  # 256 byte tokens, 4 control tokens and one of text


def load_tokenizer(
    path: str | Path, hint: str = "give the path of a SentencePiece .model file"
) -> sentencepiece.SentencePieceProcessor:
    """Open a SentencePiece model.

    Args:
        path: The file.
        hint: What to do if it is missing, for the error.

    Raises:
        UserError: If the file is missing, may not be read, is not a SentencePiece model, its BOS is not token 1, or
            its tokens do not tell how many bytes of text they stand for.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no tokenizer; {hint}")
    try:
        with Path(path).open("rb"):  # SentencePiece calls a file that may not be read none of its own
            tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except PermissionError as error:
        raise cannot_read(error) from error
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: is not a SentencePiece model ({error})") from error
    if has_case_markup(tokenizer):
        tokenizer = CaseMarkupProcessor(path)
    if tokenizer.bos_id() != BOS:
        raise UserError(f"{path}: its BOS is token {tokenizer.bos_id()}, but shards use {BOS}; use another tokenizer")
    if _added_spaces(tokenizer)[1]:
        raise UserError(
            f"{path}: adds a space after every text, which cannot be told from one of it; use another tokenizer"
        )
    has_bytes = any(tokenizer.is_byte(index) for index in range(tokenizer.get_piece_size()))
    if has_bytes and tokenizer.is_unknown(tokenizer.piece_to_id(SPACE)):
        raise UserError(f"{path}: has no token for a space and spells it in three bytes; use another tokenizer")
    return tokenizer


def check_case_markup(path: str | Path, tokenizer: sentencepiece.SentencePieceProcessor, wanted: bool | None) -> None:
    """Refuse a tokenizer that has case markup where none is wanted, or the other way round.

    Args:
        path: Its file, for the error.
        tokenizer: The tokenizer.
        wanted: `data.case_markup`; None: any.

    Raises:
        UserError: If it is the other kind.
    """
    if wanted is not None and (has := has_case_markup(tokenizer)) != wanted:
        raise UserError(
            f"{path}: this tokenizer has {'' if has else 'no '}case markup, but data.case_markup is "
            f"{str(wanted).lower()}; give --data.case_markup {str(has).lower()}, or another tokenizer"
        )


def normalized_bytes(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> int:
    """UTF-8 bytes of a text after the tokenizer's normalization, the denominator of bits per byte.

    A space counts as one byte; the one that the tokenizer itself adds at the start or the end does not count.
    """
    normalized = str(tokenizer.normalize(text))
    prefix, suffix = _added_spaces(tokenizer)
    if normalized and prefix:
        normalized = normalized.removeprefix(SPACE)
    elif normalized and suffix:
        normalized = normalized.removesuffix(SPACE)
    return len(normalized.replace(SPACE, " ").encode())


def _added_spaces(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[bool, bool]:
    """Whether the tokenizer adds a space before a text, or after it."""
    example = str(tokenizer.normalize("a"))
    return example.startswith(SPACE), example.endswith(SPACE)


def check_trainable_size(vocab_size: int, option: str = "data.source.vocab_size") -> None:
    """Refuse a vocabulary that no tokenizer can be trained for.

    Args:
        vocab_size: Its size.
        option: Option that sets it, for the error.

    Raises:
        UserError: If it is too small for its fixed tokens, or too large for 16 bits.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise UserError(f"{option} must be between {MIN_VOCAB} and {MAX_VOCAB:,}, not {vocab_size:,}")


def train_tokenizer(
    sentences: Iterator[str],
    vocab_size: int,
    path: str | Path,
    num_threads: int,
    option: str = "--data.source.vocab_size",
    case_markup: bool = False,
) -> None:
    """Train a model of the challenge's kind: BPE, byte fallback, split digits, NFKC, no dummy prefix.

    Args:
        sentences: The text, in sentences of at most a few thousand characters.
        vocab_size: Vocabulary size, the 256 byte tokens and 4 control tokens included.
        path: The model file to write.
        num_threads: Threads for SentencePiece.
        option: Option that sets the vocabulary size, for the error.
        case_markup: Whether it marks capital letters (trainer/data/case_markup.py).

    Raises:
        UserError: If the text is too small for the vocabulary, or reading it fails.
    """
    failures: list[BaseException] = []

    def read() -> Iterator[str]:
        try:
            if case_markup:
                yield from training_text(sentences)
            else:
                yield from sentences
        except (UserError, KeyboardInterrupt) as error:
            failures.append(error)  # SentencePiece hides it behind one of its own
            raise

    try:
        model = io.BytesIO()
        with TemporaryDirectory() as folder:
            rules = write_rules(Path(folder)) if case_markup else ("", "")
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=read(),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity" if case_markup else "nmt_nfkc",
                normalization_rule_tsv=rules[0],
                denormalization_rule_tsv=rules[1],
                pretokenization_delimiter=DELIMITER if case_markup else "",
                add_dummy_prefix=False,
                character_coverage=0.999,
                required_chars=SPACE + MARK * case_markup,  # else they could become three byte tokens
                pad_id=0,
                bos_id=BOS,
                eos_id=2,
                unk_id=3,
                num_threads=num_threads,
                minloglevel=2,
            )
    except RuntimeError as error:
        if failures:
            raise failures[0] from error
        most = re.search(r"<= (\d+)", str(error))
        if most and int(most[1]) >= MIN_VOCAB:
            raise UserError(
                f"this text is enough for a vocabulary of {int(most[1]):,} tokens, not of {vocab_size:,}; give more "
                f"text, or {option} {most[1]}"
            ) from error
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"this text has so many different characters that it needs a vocabulary of at least {int(needed[1]):,} "
                f"tokens, not {vocab_size:,}; give {option} {needed[1]}"
            ) from error
        reason = str(error).splitlines()[-1].rpartition("] ")[2]  # after the place in SentencePiece's sources
        reason = reason or "it is empty"
        raise UserError(f"this text is too short to train a tokenizer ({reason}); give more text") from error
    Path(path).write_bytes(without_paths(model.getvalue()) if case_markup else model.getvalue())


@dataclass(frozen=True)
class ByteTable:
    """The UTF-8 bytes of the text that every token stands for.

    A token counts the bytes of its text without one leading space. That space counts 1 byte, unless the token before is
    a boundary (a control, unknown or unused token) and the tokenizer itself adds a space at the start of a text. Byte
    tokens count 1. Source: openai/parameter-golf. A space inside a token counts as the one byte it is, not as the three
    of SentencePiece's marker, and the mark of case markup, which is no text, as none.

    Attributes:
        text_bytes: (V,) int64, bytes without the leading space.
        leading_space: (V,) bool, whether it starts with a space.
        boundary: (V,) bool, whether it is a control, unknown or unused token after which a space does not count.
    """

    text_bytes: Tensor
    leading_space: Tensor
    boundary: Tensor

    @classmethod
    def from_tokenizer(cls, tokenizer: sentencepiece.SentencePieceProcessor) -> "ByteTable":
        """Count the bytes of every token of a tokenizer."""
        adds_prefix, _ = _added_spaces(tokenizer)
        mark = tokenizer.piece_to_id(MARK) if has_case_markup(tokenizer) else None
        size = tokenizer.get_piece_size()
        text_bytes = torch.zeros(size, dtype=torch.int64)
        leading_space = torch.zeros(size, dtype=torch.bool)
        boundary = torch.zeros(size, dtype=torch.bool)
        for index in range(size):
            piece = tokenizer.id_to_piece(index)
            if tokenizer.is_control(index) or tokenizer.is_unknown(index) or tokenizer.is_unused(index):
                boundary[index] = adds_prefix
            elif index == mark:
                continue
            elif tokenizer.is_byte(index):
                text_bytes[index] = 1
            else:
                leading_space[index] = piece.startswith(SPACE)
                text_bytes[index] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        return cls(text_bytes, leading_space, boundary)

    def to(self, device: torch.device | str) -> "ByteTable":
        """The same table on another device."""
        return ByteTable(self.text_bytes.to(device), self.leading_space.to(device), self.boundary.to(device))

    def total(self, tokens: np.ndarray[tuple[int], np.dtype[np.uint16]], chunk: int = 1_000_000) -> int:
        """Bytes of all tokens but the first, each given the one before; the same as `count`, in numpy.

        Args:
            tokens: (n,) uint16.
            chunk: Tokens processed at once, to bound memory.
        """
        text_bytes, leading = self.text_bytes.numpy(), self.leading_space.numpy()
        inside = ~self.boundary.numpy()
        total = 0
        for start in range(1, len(tokens), chunk):
            targets = tokens[start : start + chunk]
            previous = tokens[start - 1 : start - 1 + len(targets)]
            total += int(np.bincount(targets, minlength=len(text_bytes)) @ text_bytes)
            total += int(np.count_nonzero(leading.take(targets) & inside.take(previous)))
        return total

    def check(self, ids: TokenArray, num_bytes: int, origin: str) -> None:
        """Refuse a document whose tokens stand for other bytes than it has.

        Args:
            ids: (n,) its tokens, without BOS.
            num_bytes: Its `normalized_bytes`.
            origin: Where it comes from, for the error.

        Raises:
            UserError: If the numbers differ.
        """
        if (counted := self.total(np.concatenate([BEGIN, ids]))) != num_bytes:
            raise UserError(
                f"{origin}: a document has {num_bytes:,} bytes, but its tokens stand for {counted:,}: the tokenizer "
                "has no tokens for some of its characters; use one with byte fallback"
            )

    def count(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target, given the token before it.

        Args:
            previous: Tokens before the targets, any integer type and shape.
            targets: Tokens of the same shape.

        Returns:
            int64, of the same shape.
        """
        targets = targets.long()
        return self.text_bytes[targets] + (self.leading_space[targets] & ~self.boundary[previous.long()])
