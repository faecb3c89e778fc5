"""Tokenizes text into shards: on all cores, in bounded memory; a shard has its name only when it is whole."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from trainer.data.manifest import Manifest, ShardRecord
from trainer.data.normalization import NormalizationSample
from trainer.data.shards import TokenArray, check_vocab_size, write_shard
from trainer.data.tokenizer import BEGIN, ByteTable, load_tokenizer, normalized_bytes
from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.logging import logger
from trainer.progress_display import open_display

CHUNK_CHARACTERS = 4_000_000  # of text, tokenized at once
SHARD_TOKENS = 100_000_000  # as in the published export
SPLITS = ("train", "val")
PROGRESS_SECONDS = 5.0  # between two lines
IdArray = np.ndarray[tuple[int], np.dtype[np.int32]]


def split_of(key: bytes, val_every: int) -> str:
    """Whether a document is for training or, about one in `val_every`, for validation: by its key alone."""
    return SPLITS[int.from_bytes(key[:8]) % val_every == 0]


class Document(NamedTuple):
    """A text, its split (None: it is left out, because the validation split has it), and its origin for messages."""

    split: str | None
    text: str
    origin: str


class ShardWriter:
    """Collects documents of one split and writes a shard whenever the next one would be too long."""

    def __init__(self, folder: Path, split: str, table: ByteTable, shard_tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.table = table
        self.shard_tokens = shard_tokens
        self.records: list[ShardRecord] = []
        self.text = hashlib.sha256()  # of all documents in order
        self._parts: list[TokenArray] = []
        self._tokens = self._text_bytes = self._bytes = 0

    def add(self, ids: TokenArray, text: str, num_bytes: int, origin: str) -> None:
        """Add a document.

        Args:
            ids: (n,) its tokens, without BOS.
            text: Its text before normalization.
            num_bytes: UTF-8 bytes of its text after normalization.
            origin: Where it comes from.

        Raises:
            UserError: If it is longer than a shard, or its tokens do not tell its bytes.
        """
        length = len(ids) + 1
        self.table.check(ids, num_bytes, origin)
        if length > self.shard_tokens:
            raise UserError(
                f"{origin}: a document of {length:,} tokens is longer than a shard ({self.shard_tokens:,}); "
                "split it into documents, for instance into lines of a .jsonl file"
            )
        if self._tokens + length > self.shard_tokens:
            self.flush()
        raw = text.encode()
        self.text.update(len(raw).to_bytes(8))
        self.text.update(raw)
        self._parts += [BEGIN, ids]
        self._tokens += length
        self._text_bytes += len(raw)
        self._bytes += num_bytes

    def flush(self) -> None:
        """Write the collected documents, if there are any."""
        if not self._parts:
            return
        documents, tokens = len(self._parts) // 2, np.concatenate(self._parts)
        self._parts = []  # hundreds of megabytes that `tokens` holds too
        path = self.folder / f"text_{self.split}_{len(self.records):06d}.bin"
        write_shard(path, tokens)
        self.records.append(
            ShardRecord(
                path.name,
                self.split,
                documents=documents,
                tokens=len(tokens),
                bytes=self._bytes,
                text_bytes=self._text_bytes,
                sha256=sha256_of(path),
            )
        )
        self._tokens = self._text_bytes = self._bytes = 0


def tokenize(
    documents: Iterable[Document],
    tokenizer: Path,
    folder: Path,
    source: dict[str, Any],
    fraction: Callable[[], float] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    processor: sentencepiece.SentencePieceProcessor | None = None,
) -> Manifest:
    """Write shards and, at the end, their manifest.

    While a chunk is encoded by all cores, the next one is read and the one before is stored. Memory holds one shard of
    each split, twice while it is written, and three chunks.

    Args:
        documents: The documents in reading order.
        tokenizer: SentencePiece model.
        folder: Where the shards go.
        source: Class and settings of the source, for the manifest.
        fraction: Returns the share of the input that has been read (0 to 1), for the progress display.
        shard_tokens: Most tokens of a shard.
        processor: The model, opened in another way than `load_tokenizer` does.

    Raises:
        UserError: If a split stays empty, a document is longer than a shard, or a file cannot be written.
    """
    processor = processor or load_tokenizer(tokenizer)
    check_vocab_size(tokenizer, processor.get_piece_size())
    table = ByteTable.from_tokenizer(processor)
    writers = {split: ShardWriter(folder, split, table, shard_tokens) for split in SPLITS}
    sample = NormalizationSample(processor) if logger.isEnabledFor(logging.DEBUG) else None
    threads = os.cpu_count() or 1
    started = time.monotonic()
    display = open_display("auto", PROGRESS_SECONDS)
    dropped = 0

    def kept() -> Iterator[Document]:
        nonlocal dropped
        for document in documents:
            if document.split is None:
                dropped += 1
            else:
                yield document

    chunks = _chunks(kept())

    def encode() -> tuple[list[Document], list[IdArray]] | None:
        chunk = next(chunks, None)
        if chunk is None:
            return None
        # Arrays: making Python integers would take a fifth of the time, on one core.
        return chunk, processor.encode_as_numpy([document.text for document in chunk], num_threads=threads)

    try:
        with ThreadPoolExecutor(1) as encoder:
            next_chunk = encoder.submit(encode)
            while (result := next_chunk.result()) is not None:
                next_chunk = encoder.submit(encode)
                for document, ids in zip(*result, strict=True):
                    assert document.split is not None
                    if sample is not None:
                        sample.add(document.text)
                    num_bytes = normalized_bytes(processor, document.text)
                    writers[document.split].add(ids.astype(np.uint16), document.text, num_bytes, document.origin)
                if fraction is not None:
                    display.update_task("tokenizing", fraction(), 1.0)
    finally:
        display.close()
    for writer in writers.values():
        writer.flush()
        if not writer.records:
            raise UserError(
                f"no document is left for the {writer.split} split; give more text or name that split's files"
            )
    seconds = time.monotonic() - started
    total = sum(record.text_bytes for writer in writers.values() for record in writer.records)
    logger.info(f"tokenized {total / 1e6:,.1f} MB in {seconds:.1f} s ({total / 1e6 / seconds:.1f} MB/s)")
    if dropped:
        logger.info(f"left out {dropped:,} training documents that the validation split has")
    if sample is not None:
        logger.debug(sample.describe())
    records = [record for split in SPLITS for record in writers[split].records]
    versions = {name: version(name) for name in ("sentencepiece", "numpy")}
    text = {split: writers[split].text.hexdigest() for split in SPLITS}
    manifest = Manifest(source, sha256_of(tokenizer), records, text, dropped, versions)
    manifest.write(folder)
    return manifest


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
