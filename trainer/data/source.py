"""What a source of text is, its shards in a folder, and the tokenizer that one trains."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.manifest import MANIFEST, Manifest
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import UserError
from trainer.logging import logger

TRAIN_PATTERN = "*_train_*.bin"
VAL_PATTERN = "*_val_*.bin"
SAMPLE_BYTES = 50_000_000  # of training text, for a tokenizer
SENTENCE_CHARACTERS = 2000


@dataclass(frozen=True)
class PreparedText:
    """Token shards in reading order, and the tokenizer that made them."""

    train: list[Path]
    val: list[Path]
    tokenizer: Path


class Source(ABC):
    """Text that can be prepared; the subclasses are the choices for `--data.source`.

    Attributes:
        model_vocab_size: Vocabulary size of the model, which the data module sets; a tokenizer that is trained has it
            unless the source was given another.
        case_markup: `data.case_markup`, which the data module sets. None: of tokenizers that are trained here.
    """

    model_vocab_size = 1024
    case_markup: bool | None = None

    def check(self) -> None:  # noqa: B027 - a source may have nothing to check
        """Refuse settings and files that `prepare` would refuse, for `--dry_run`; reads no text and makes nothing.

        Raises:
            UserError: With what is wrong.
        """

    def known_vocab_size(self) -> int | None:
        """Vocabulary size that the settings fix; None: unknown, or that of the model.

        Raises:
            UserError: If a setting or a tokenizer that is given cannot be used.
        """
        return None

    def is_prepared(self) -> bool:
        """Whether `prepare` would leave the shards that are there as they are."""
        return True

    @abstractmethod
    def prepare(self, only_if_missing: bool = False) -> None:
        """Make the shards if they do not exist yet.

        Args:
            only_if_missing: Keep shards that were made from other files or settings: a run that resumes needs them.
        """

    @abstractmethod
    def prepared(self) -> PreparedText:
        """The shards and the tokenizer.

        Raises:
            UserError: If something is missing.
        """


def list_shards(folder: Path, tokenizer: Path) -> PreparedText:
    """Find the shards of a folder by the challenge's file names.

    Raises:
        UserError: If the folder, the training shards or the validation shards are missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is not a folder; prepare it (your own text with --data.source LocalText, the Hub's with "
            "--data.source PublishedFineWeb), or name one with token shards with --data.source.folder"
        )
    train, val = sorted(folder.glob(TRAIN_PATTERN)), sorted(folder.glob(VAL_PATTERN))
    for shards, pattern in ((train, TRAIN_PATTERN), (val, VAL_PATTERN)):
        if not shards:
            raise UserError(f"{folder}: holds no shard named {pattern}; prepare it or name another folder")
    if (manifest := Manifest.read(folder)) is not None:
        listed, present = {shard.file for shard in manifest.shards}, {path.name for path in (*train, *val)}
        for name in sorted(listed - present):
            raise UserError(
                f"{folder / name}: is missing, but the folder's {MANIFEST} lists it; prepare the folder again"
            )
        for name in sorted(present - listed):
            raise UserError(f"{folder / name}: is not listed in the folder's {MANIFEST}; remove it")
    return PreparedText(train, val, tokenizer)


def train_for_source(
    model: Path, texts: Iterable[str], vocab_size: int | None, model_vocab_size: int, case_markup: bool
) -> None:
    """Train a tokenizer; an error names the option that sets its size."""
    size = vocab_size or model_vocab_size
    logger.info(f"training a tokenizer with a vocabulary of {size:,}")
    option = f"--{size_option(vocab_size)}"
    train_tokenizer(_sentences(texts), size, model, os.cpu_count() or 1, option, case_markup)


def size_option(vocab_size: int | None) -> str:
    """The option that says how large the vocabulary of a tokenizer is."""
    return "model.vocab_size" if vocab_size is None else "data.source.vocab_size"


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Lines for training a tokenizer, cut where SentencePiece would drop them for their length."""
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[start : start + SENTENCE_CHARACTERS]
