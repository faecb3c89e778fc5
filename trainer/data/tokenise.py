"""Text into shards: all cores, bounded memory, and no shard under its name before it is whole."""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.manifest import NAME, Manifest, ShardRecord
from trainer.data.normalisation import NormalisationSample
from trainer.data.shards import HEADER_BYTES, TokenArray, check_size, write_shard
from trainer.data.tokenizer import BOS, ByteTable, load_tokenizer
from trainer.errors import UserError
from trainer.files import sha256_of

CHUNK_LETTERS = 4_000_000  # of text, tokenised at once
SHARD_TOKENS = 100_000_000  # as in the published export
SPLITS = ("train", "val")
IdArray = np.ndarray[tuple[int], np.dtype[np.int32]]
BEGIN = np.array([BOS], dtype=np.uint16)


def split_of(text: str, val_every: int) -> str:
    """Whether a document is for training or, about one in `val_every`, for validation: by its sha256 alone."""
    return SPLITS[int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % val_every == 0]


class Document(NamedTuple):
    """A text, the split it is for, and where it stands, for an error."""

    split: str
    text: str
    place: str


class ShardWriter:
    """Collects documents of one split and writes a shard whenever the next one would be too long."""

    def __init__(self, folder: Path, split: str, table: ByteTable, shard_tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.table = table
        self.shard_tokens = shard_tokens
        self.records: list[ShardRecord] = []
        self._parts: list[TokenArray] = []
        self._tokens = self._text_bytes = 0

    def add(self, ids: TokenArray, text_bytes: int, place: str) -> None:
        """Take a document, without BOS.

        Raises:
            UserError: If it is longer than a shard.
        """
        length = len(ids) + 1
        if length > self.shard_tokens:
            raise UserError(
                f"{place}: a document of {length:,} tokens is longer than a shard ({self.shard_tokens:,}); "
                "cut it into documents, for instance into lines of a .jsonl file"
            )
        if self._tokens + length > self.shard_tokens:
            self.flush()
        self._parts += [BEGIN, ids]
        self._tokens += length
        self._text_bytes += text_bytes

    def flush(self) -> None:
        """Write what is collected, if anything."""
        if not self._parts:
            return
        documents, tokens = len(self._parts) // 2, np.concatenate(self._parts)
        self._parts = []  # the same tokens again: hundreds of megabytes
        path = self.folder / f"text_{self.split}_{len(self.records):06d}.bin"
        write_shard(path, tokens)
        self.records.append(
            ShardRecord(
                path.name,
                self.split,
                documents=documents,
                tokens=len(tokens),
                bytes=self.table.total(tokens),
                text_bytes=self._text_bytes,
                sha256=sha256_of(path),
            )
        )
        self._tokens = self._text_bytes = 0


def tokenise(
    documents: Iterable[Document],
    tokenizer: Path,
    folder: Path,
    source: dict[str, Any],
    fraction: Callable[[], float] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Write shards and, at the end, their manifest.

    While a chunk is encoded by all cores, the next one is read and the one before is stored. Memory holds one shard of
    each split, twice while it is written, and three chunks.

    Args:
        documents: In reading order.
        tokenizer: SentencePiece model.
        folder: Where the shards go.
        source: What made them, for the manifest.
        fraction: Share of the input that has been read, for the progress lines.
        shard_tokens: Longest shard.

    Raises:
        UserError: If a split stays empty, a document is longer than a shard, or a file cannot be written.
    """
    processor = load_tokenizer(tokenizer)
    check_size(tokenizer, processor.get_piece_size())
    table = ByteTable.from_tokenizer(processor)
    writers = {split: ShardWriter(folder, split, table, shard_tokens) for split in SPLITS}
    sample = NormalisationSample(processor)
    threads = os.cpu_count() or 1
    progress = Progress(fraction)
    chunks = _chunks(documents)

    def encode() -> tuple[list[Document], list[IdArray]] | None:
        chunk = next(chunks, None)
        if chunk is None:
            return None
        # Arrays: Python's integers would take a fifth of the time, on one core.
        return chunk, processor.encode_as_numpy([document.text for document in chunk], num_threads=threads)

    with ThreadPoolExecutor(1) as encoder:
        waiting = encoder.submit(encode)
        while (result := waiting.result()) is not None:
            waiting = encoder.submit(encode)
            for document, ids in zip(*result, strict=True):
                sample.add(document.text)
                size = len(document.text.encode())
                writers[document.split].add(ids.astype(np.uint16), size, document.place)
                progress.add(size)
    for writer in writers.values():
        writer.flush()
        if not writer.records:
            raise UserError(
                f"{folder}: no document is left for the {writer.split} split; give more text or name its files"
            )
    progress.end()
    print(sample.describe(), flush=True)
    records = [record for split in SPLITS for record in writers[split].records]
    versions = {name: version(name) for name in ("sentencepiece", "numpy")}
    manifest = Manifest(source, sha256_of(tokenizer), records, versions)
    manifest.write(folder)
    return manifest


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    letters = 0
    for document in documents:
        chunk.append(document)
        letters += len(document.text)
        if letters >= CHUNK_LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


class Progress:
    """A line every few seconds: text read, speed, time left."""

    def __init__(self, fraction: Callable[[], float] | None, every_seconds: float = 5.0) -> None:
        self.fraction = fraction
        self.every_seconds = every_seconds
        self._started = self._last = time.monotonic()
        self._bytes = 0

    def add(self, size: int) -> None:
        """Count bytes of text; print when it is time."""
        self._bytes += size
        now = time.monotonic()
        if now - self._last >= self.every_seconds:
            self._last = now
            self._print(now - self._started)

    def end(self) -> None:
        """Print the total, if lines were printed before."""
        if self._last != self._started:
            self.fraction = None
            self._print(time.monotonic() - self._started)

    def _print(self, seconds: float) -> None:
        share = self.fraction() if self.fraction else 0.0
        left = f", about {seconds / share - seconds:,.0f} s left" if share > 0 else ""
        print(f"tokenised {self._bytes / 1e6:,.1f} MB, {self._bytes / 1e6 / seconds:.1f} MB/s{left}", flush=True)


def is_prepared(folder: Path, source: dict[str, Any]) -> bool:
    """Whether a folder's manifest names this source and its shards are there in full length."""
    try:
        manifest = Manifest.read(folder)
    except UserError:  # damaged: as good as none
        return False
    if manifest is None or manifest.source != source:
        return False
    return all(
        (folder / shard.file).is_file() and (folder / shard.file).stat().st_size == HEADER_BYTES + 2 * shard.tokens
        for shard in manifest.shards
    )


def clear(folder: Path) -> None:
    """Take away what an earlier preparation made, its manifest first, so that a half-made folder is never believed.

    Raises:
        UserError: If shards lie there that were not made here.
    """
    started = folder / "preparing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards = list(itertools.chain.from_iterable(folder.glob(f"*_{split}_*.bin") for split in SPLITS))
        if shards and not (folder / NAME).exists() and not started.exists():
            raise UserError(f"{folder}: holds shards that were not made here; choose another data.source.folder")
        started.touch()
        (folder / NAME).unlink(missing_ok=True)
        for path in shards:
            path.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another data.source.folder") from error


def finished(folder: Path) -> None:
    """Say that the folder is whole."""
    (folder / "preparing").unlink(missing_ok=True)
