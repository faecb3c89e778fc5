"""Published shards encoded again with a tokenizer that has case markup: the same documents, splits and bytes."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.case_markup import has_case_markup
from trainer.data.manifest import TOKENIZER, Manifest
from trainer.data.preparation import check_folder, is_prepared, prepare_folder
from trainer.data.shard_writer import BEGIN, SPLITS, Document, tokenize
from trainer.data.shards import TokenArray, TokenFiles
from trainer.data.source import SAMPLE_BYTES, PreparedText, list_shards, size_option, train_for_source
from trainer.data.tokenizer import BOS, ByteTable, check_trainable_size, load_tokenizer
from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.logging import counted, logger

CHUNK_TOKENS = 1_000_000  # decoded at once


class MarkedCopy:
    """A folder in `data` with shards of the text of other shards, in a tokenizer with case markup."""

    def __init__(self, name: str, original: PreparedText, vocab_size: int) -> None:
        """Take the shards; nothing is written yet.

        Args:
            name: Of the original; the copy's folder is named after it.
            original: Shards, and the tokenizer that they were made with.
            vocab_size: Vocabulary size of the tokenizer that is trained for the copy.
        """
        self.folder = Path("data") / f"{name}-case-markup"
        self.original = original
        self.vocab_size = vocab_size

    @property
    def is_needed(self) -> bool:
        """Whether the original has no case markup yet."""
        return not has_case_markup(load_tokenizer(self.original.tokenizer))

    def check(self) -> None:
        """Refuse a vocabulary that cannot be trained, and a folder that is not ours."""
        check_trainable_size(self.vocab_size, size_option(None))
        if not self.is_needed:
            return
        check_folder(self.folder, record := self._record())
        copied = Manifest.read(self.folder)
        before, now = (
            {shard[0] for shard in source.get("shards", [])} for source in (copied.source if copied else record, record)
        )
        if not before & now:
            raise UserError(
                f"{self.folder}: is a copy of other shards, {min(before)}; remove it, or run from another folder"
            )

    def is_prepared(self) -> bool:
        """Whether `prepare` would leave the copy as it is."""
        return not self.is_needed or is_prepared(self.folder, self._record())

    def prepare(self, only_if_missing: bool = False) -> None:
        """Write the copy, unless its manifest says that this was done.

        Raises:
            UserError: If the bytes of a document are not those that its tokens stood for.
        """
        if self.is_needed:
            self.check()
            prepare_folder(self.folder, self._record(), self._make, only_if_missing)

    def prepared(self) -> PreparedText:
        """The shards of the copy, or the original where it has case markup."""
        return list_shards(self.folder, self.folder / TOKENIZER) if self.is_needed else self.original

    def _record(self) -> dict[str, Any]:
        """What the manifest says of the source."""
        shards = [*self.original.train, *self.original.val]
        return {
            "class": "MarkedCopy",
            "shards": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in shards],
            "tokenizer": sha256_of(self.original.tokenizer),
            "vocab_size": self.vocab_size,
        }

    def _make(self, folder: Path) -> None:
        """Write shards and manifest into a folder."""
        train, val = TokenFiles(self.original.train), TokenFiles(self.original.val)
        train_for_source(folder / TOKENIZER, self._sample(train), None, self.vocab_size, case_markup=True)
        total, done = len(train) + len(val), 0
        logger.info(
            f"encoding {counted(total, 'token')} of {self.original.tokenizer} again, with case markup, into "
            f"{self.folder}"
        )

        def documents() -> Iterator[Document]:
            nonlocal done
            for split, files in (("val", val), ("train", train)):
                for text, count in self._texts(files):
                    done += count
                    yield Document(split, text, f"{files.paths[0].parent}: the {split} split")

        manifest = tokenize(documents(), folder / TOKENIZER, folder, self._record(), lambda: done / total)
        self._refuse_lost_bytes(manifest)
        before = Manifest.read(self.original.train[0].parent)
        if before is not None and _counts(before) == _counts(manifest):  # the same documents, to `compare` as well
            replace(manifest, text=before.text).write(folder)

    def _refuse_lost_bytes(self, manifest: Manifest) -> None:
        for shard in manifest.shards:
            if shard.bytes != shard.text_bytes:
                raise UserError(
                    f"{self.original.tokenizer}: its normalization is not that of the challenge's tokenizers: of "
                    f"{shard.text_bytes:,} bytes, {shard.bytes:,} would be left; use the shards as they are, "
                    "--data.case_markup null"
                )

    def _sample(self, files: TokenFiles) -> Iterator[str]:
        """The first training documents."""
        size = 0
        for text, _ in self._texts(files):
            yield text
            size += len(text.encode())
            if size >= SAMPLE_BYTES:
                return

    def _texts(self, files: TokenFiles) -> Iterator[tuple[str, int]]:
        """The documents of one split as text, each with the number of its tokens."""
        tokenizer = load_tokenizer(self.original.tokenizer)
        table = ByteTable.from_tokenizer(tokenizer)
        threads = os.cpu_count() or 1
        for batch, is_last in _batches(files):
            if batch and batch[0][0] != BOS:  # of a text that begins without one
                batch[0] = np.concatenate([BEGIN, batch[0]])
            texts = tokenizer.decode([ids[1:].tolist() for ids in batch], num_threads=threads)
            for index, (ids, text) in enumerate(zip(batch, texts, strict=True)):
                if table.total(ids) == len(text.encode()):
                    if text:
                        yield text, len(ids)
                elif not (is_last and index == len(batch) - 1 and files.paths == self.original.train):
                    raise UserError(
                        f"{files.paths[0].parent}: a document that begins {text[:40]!r} has {len(text.encode()):,} "
                        f"bytes, but its tokens stand for {table.total(ids):,}; they were made by another tokenizer "
                        f"than {self.original.tokenizer}"
                    )


def _counts(manifest: Manifest) -> list[int]:
    """Documents of each split."""
    return [sum(shard.documents for shard in manifest.of(split)) for split in SPLITS]


def _batches(files: TokenFiles) -> Iterator[tuple[list[TokenArray], bool]]:
    """The tokens of documents, each with its BOS, and whether they are the last.

    A document may go on in the next shard. The last one may be cut where the shards that were chosen end.
    """
    rest = np.empty(0, dtype=np.uint16)
    for start in range(0, len(files), CHUNK_TOKENS):
        count = min(CHUNK_TOKENS, len(files) - start)
        tokens = np.concatenate([rest, files.read(start, count)])
        is_last = start + count == len(files)
        starts = np.flatnonzero(tokens == BOS)
        starts = starts[starts > 0]
        documents = np.split(tokens, starts)
        rest = documents[-1]
        yield (documents if is_last else documents[:-1]), is_last
