"""Shards encoded again with a tokenizer that has case markup: the same documents, splits and bytes."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.case_markup import RULES, CaseMarkupProcessor, has_case_markup
from trainer.data.manifest import MANIFEST, TOKENIZER, Manifest, check_tokenizer, check_vocabulary
from trainer.data.preparation import check_folder, is_prepared, prepare_folder
from trainer.data.shard_writer import SPLITS, Document, tokenize
from trainer.data.shards import TokenArray, TokenFiles
from trainer.data.source import SAMPLE_BYTES, PreparedText, list_shards, size_option, train_for_source
from trainer.data.tokenizer import BEGIN, BOS, ByteTable, check_trainable_size, load_tokenizer
from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.logging import counted, logger

CHUNK_TOKENS = 1_000_000  # decoded at once
BLOCKS, BLOCK_BYTES = 16, 65_536  # of a shard, for its hash
HINT = "run from another folder"
CLASS = "MarkedCopy"  # of the source, in manifests


class MarkedCopy:
    """A folder in `data` with shards of the text of other shards, in a tokenizer with case markup."""

    def __init__(self, name: str, original: Callable[[], PreparedText], vocab_size: int) -> None:
        """Take the shards; nothing is read or written yet.

        Args:
            name: Name of the original folder or variant, with which the name of the copy begins.
            original: Returns the shards and the tokenizer that they were made with, or raises a UserError.
            vocab_size: Vocabulary size of the tokenizer that is trained for the copy.
        """
        self.folder = Path("data") / f"{name}-case-markup-{vocab_size}"
        self.original = original
        self.vocab_size = vocab_size

    def check(self) -> None:
        """Refuse shards that cannot be copied, unless they are not there yet, and a folder that is not ours.

        Raises:
            UserError: With what is wrong.
        """
        check_trainable_size(self.vocab_size, size_option(None))
        try:
            original = self._find()
        except UserError:
            original = None
        if original is None:
            check_folder(self.folder, {"class": CLASS}, HINT)
            return
        if not _needs_copy(original):
            return
        check_tokenizer(original.train[0].parent, original.tokenizer)
        check_folder(self.folder, record := self._record(original), HINT)
        self._refuse_other_shards(record)

    def is_prepared(self) -> bool:
        """Whether `prepare` would leave the copy as it is."""
        try:
            original = self._find()
        except UserError:
            return False
        return original is None or not _needs_copy(original) or is_prepared(self.folder, self._record(original))

    def prepare(self, only_if_missing: bool = False) -> None:
        """Write the copy, unless its manifest says that this was done, or it is all that is left.

        Raises:
            UserError: If the original is missing or damaged.
        """
        original = self._find()
        if original is not None and _needs_copy(original):
            self.check()
            record = self._record(original)
            prepare_folder(
                self.folder, record, lambda folder: self._make(folder, record, original), only_if_missing, HINT
            )

    def prepared(self) -> PreparedText:
        """The shards of the copy, or the original where it has case markup.

        Raises:
            UserError: If neither is there.
        """
        original = self._find()
        if original is not None:
            if not _needs_copy(original):
                return original
            self._refuse_other_shards(self._record(original))
        return list_shards(self.folder, self.folder / TOKENIZER)

    def has_original_vocabulary(self) -> bool:
        """Whether the original is there and is used as it is."""
        try:
            return not _needs_copy(self.original())
        except UserError:
            return False

    def _find(self) -> PreparedText | None:
        """The original, or None where only the copy is left; raises a UserError if neither is there."""
        try:
            return self.original()
        except UserError:
            if (self.folder / MANIFEST).is_file():
                return None
            raise

    def _refuse_other_shards(self, record: dict[str, Any]) -> None:
        copied = Manifest.read(self.folder)
        if copied is None or copied.source.get("class") != CLASS:
            return
        before, now = (set(map(tuple, source["shards"])) for source in (copied.source, record))
        if not before & now:
            raise UserError(f"{self.folder}: is a copy of other shards than these; {HINT}, or remove it")

    def _record(self, original: PreparedText) -> dict[str, Any]:
        """What the manifest says of the source: wherever the shards are, and whenever they came there."""
        return {
            "class": CLASS,
            "shards": [
                [path.name, path.stat().st_size, _sample_hash(path)] for path in (*original.train, *original.val)
            ],
            "tokenizer": sha256_of(original.tokenizer),
            "case_markup": RULES,
            "vocab_size": self.vocab_size,
        }

    def _make(self, folder: Path, record: dict[str, Any], original: PreparedText) -> None:
        """Write shards and manifest into a folder."""
        train, val = TokenFiles(original.train), TokenFiles(original.val)
        model = folder / TOKENIZER
        train_for_source(model, _sample(train, original.tokenizer), None, self.vocab_size, case_markup=True)
        total, done = len(train) + len(val), 0
        logger.info(f"encoding {counted(total, 'token')} again, with case markup, into {self.folder}")

        def documents() -> Iterator[Document]:
            nonlocal done
            for split, files in (("val", val), ("train", train)):
                for text, count in _texts(files, original.tokenizer, may_be_cut=split == "train"):
                    done += count
                    yield Document(split, text, f"{files.paths[0].parent}, {split} split")

        # What was decoded is normalized; NFKC once more would change a few rare characters.
        processor = CaseMarkupProcessor(model, normalizes=False)
        manifest = tokenize(documents(), model, folder, record, lambda: done / total, processor=processor)
        before = Manifest.read(original.train[0].parent)
        if before is not None and _counts(before) == _counts(manifest):  # the same text, to `compare` as well
            replace(manifest, text=before.text).write(folder)


def _sample_hash(path: Path) -> str:
    """A hash of a few blocks all over a shard, which tells other shards apart without reading 200 MB of each."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        for part in range(BLOCKS):
            file.seek(path.stat().st_size * part // BLOCKS)
            content.update(file.read(BLOCK_BYTES))
    return content.hexdigest()[:16]


def _needs_copy(original: PreparedText) -> bool:
    return not has_case_markup(load_tokenizer(original.tokenizer))


def _counts(manifest: Manifest) -> list[int]:
    """Documents of each split."""
    return [sum(shard.documents for shard in manifest.of(split)) for split in SPLITS]


def _sample(files: TokenFiles, tokenizer: Path) -> Iterator[str]:
    """The first training documents."""
    size = 0
    for text, _ in _texts(files, tokenizer, may_be_cut=True):
        yield text
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            return


def _texts(files: TokenFiles, model: Path, may_be_cut: bool) -> Iterator[tuple[str, int]]:
    """The documents of one split as text, each with the number of its tokens.

    Args:
        files: The shards.
        model: Their tokenizer.
        may_be_cut: Whether the first and the last document are left out if they are cut inside a character or a word.

    Raises:
        UserError: If another document, or one that may not be cut, does not have the bytes that its tokens stand for,
            or has spaces that the challenge's tokenizers remove.
    """
    tokenizer = load_tokenizer(model)
    table = ByteTable.from_tokenizer(tokenizer)
    threads = os.cpu_count() or 1
    for batch, is_first, is_last in _batches(files):
        for ids in batch:
            check_vocabulary(files.paths[0].parent, ids, tokenizer.get_piece_size())
        texts = tokenizer.decode([ids[1:].tolist() for ids in batch], num_threads=threads)
        for index, (ids, text) in enumerate(zip(batch, texts, strict=True)):
            is_plain = not text or all(text.split(" "))  # no other space than one between two words
            if is_plain and table.total(ids) == len(text.encode()):
                yield text, len(ids)
            elif not (may_be_cut and ((is_first and index == 0) or (is_last and index == len(batch) - 1))):
                raise UserError(
                    f"{files.paths[0].parent}: the document that begins {text[:40]!r} cannot be encoded again without "
                    f"a change: it is truncated, or has spaces that {model} should not leave, or was made with another "
                    "tokenizer; use the shards as they are, --data.case_markup null"
                )


def _batches(files: TokenFiles) -> Iterator[tuple[list[TokenArray], bool, bool]]:
    """The tokens of documents, each with its BOS, and whether they are the first and the last.

    A document may go on in the next shard.

    Raises:
        UserError: If there is no BOS.
    """
    rest = np.empty(0, dtype=np.uint16)
    is_first = True
    for start in range(0, len(files), CHUNK_TOKENS):
        count = min(CHUNK_TOKENS, len(files) - start)
        tokens = np.concatenate([rest, files.read(start, count)])
        is_last = start + count == len(files)
        starts = np.flatnonzero(tokens == BOS)
        if is_last and is_first and not len(starts):
            raise UserError(
                f"{files.paths[0].parent}: no document begins with token {BOS} (BOS), so that they cannot be told "
                "apart; use the shards as they are, --data.case_markup null"
            )
        documents = np.split(tokens, starts[starts > 0])
        if not is_last:
            rest = documents.pop()
        if documents:
            if documents[0][0] != BOS:  # cut at its beginning
                documents[0] = np.concatenate([BEGIN, documents[0]])
            yield documents, is_first, is_last
            is_first = False
