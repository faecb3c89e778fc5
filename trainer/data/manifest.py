"""The content of a folder of shards: `manifest.json`, written last, so that an unfinished folder has none."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.case_markup import SPACE
from trainer.data.normalization import DocumentKeys
from trainer.data.shards import TokenArray, open_shard
from trainer.data.tokenizer import BOS, load_tokenizer
from trainer.errors import UserError
from trainer.files import atomic_write, cannot_read, sha256_of

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"  # beside the shards
FORMAT = 2


@dataclass(frozen=True)
class ShardRecord:
    """One shard.

    Attributes:
        file: Name of the file in the folder.
        split: train or val.
        documents: Number of documents, each after a BOS.
        tokens: Number of tokens, BOS included.
        bytes: UTF-8 bytes of the text that the tokens stand for, the denominator of bits per byte.
        text_bytes: UTF-8 bytes of the text before the tokenizer's normalization.
        sha256: Hexadecimal sha256 of the file.
    """

    file: str
    split: str
    documents: int
    tokens: int
    bytes: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder of shards.

    Attributes:
        source: Class and settings of the source, as plain values.
        tokenizer_sha256: Hexadecimal sha256 of `tokenizer.model` beside the shards.
        shards: The shards in reading order.
        text: Hexadecimal sha256 of the documents of each split in order, before any normalization.
        dropped: Number of training documents left out because the validation split has them.
        versions: Versions of the libraries that made the folder.
    """

    source: dict[str, Any]
    tokenizer_sha256: str
    shards: list[ShardRecord]
    text: dict[str, str]
    dropped: int
    versions: dict[str, str]

    @property
    def text_fingerprint(self) -> str:
        """Equal for the same text under any tokenizer: 16 digits of a sha256 of the documents of both splits."""
        return hashlib.sha256(f"{self.text['train']} {self.text['val']}".encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write it beside the shards."""
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder, or None if there is none.

        Raises:
            UserError: If it is damaged, of another format, or may not be read.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError("unknown format")
            return cls(**{**values, "shards": [ShardRecord(**shard) for shard in values["shards"]]})
        except PermissionError as error:
            raise cannot_read(error) from error
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(
                f"{path}: is not a manifest this version reads ({error}); prepare the folder again"
            ) from error

    def of(self, split: str) -> list[ShardRecord]:
        """The shards of one split."""
        return [shard for shard in self.shards if shard.split == split]


def documents_of(tokens: TokenArray) -> Iterator[TokenArray]:
    """Tokens of each document, without BOS."""
    starts = np.flatnonzero(tokens == BOS)
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield tokens[start + 1 : end]


def check_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Refuse shards whose manifest names another tokenizer: their tokens would mean other text.

    Raises:
        UserError: If it names another.
    """
    manifest, digest = Manifest.read(folder), sha256_of(tokenizer)
    if manifest is not None and manifest.tokenizer_sha256 != digest:
        raise UserError(
            f"{tokenizer}: is not the tokenizer that made the shards in {folder} (sha256 {digest[:12]}..., their "
            f"{MANIFEST} says {manifest.tokenizer_sha256[:12]}...)"
        )


def check_vocabulary(path: Path, tokens: TokenArray, vocab_size: int) -> None:
    """Check every token of a shard.

    Raises:
        UserError: If one is not in the tokenizer's vocabulary.
    """
    if (highest := int(np.max(tokens))) >= vocab_size:
        raise UserError(
            f"{path}: holds token {highest}, but the tokenizer's vocabulary size is {vocab_size:,}; "
            "it was made with another tokenizer, or is damaged: prepare it again"
        )


def verify(folder: Path) -> Manifest:
    """Read every shard again and compare it with the manifest.

    Checks header, size, checksum, largest token, number of documents and the bytes of the text. Bytes are counted by
    decoding every document, independently of the table that training uses. No document may be in both splits, also not
    with other case or spacing.

    Raises:
        UserError: At the first difference.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise UserError(f"{folder}: has no {MANIFEST}; shards made elsewhere can be inspected, but not verified")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if sha256_of(folder / TOKENIZER) != manifest.tokenizer_sha256:
        raise UserError(f"{folder / TOKENIZER}: is not the tokenizer of the manifest; prepare the folder again")
    vocab_size = tokenizer.get_piece_size()
    keys = DocumentKeys()
    validation: set[bytes] = set()
    for shard in sorted(manifest.shards, key=lambda shard: shard.split == "train"):  # the small split first
        path = folder / shard.file
        tokens = open_shard(path)
        check_vocabulary(path, tokens, vocab_size)
        counts = {"tokens": len(tokens), "documents": 0, "bytes": 0}
        for document in documents_of(tokens):
            counts["documents"] += 1
            text = tokenizer.decode(document.tolist())
            counts["bytes"] += len(text.replace(SPACE, " ").encode())
            key = keys.of(text)
            if shard.split == "val":
                validation.add(key)
            elif key in validation:
                raise UserError(f"{path}: document {counts['documents']:,} is in the validation split too")
        for name, value in {**counts, "sha256": sha256_of(path)}.items():
            if value != getattr(shard, name):
                raise UserError(
                    f"{path}: {name} is {value}, but the manifest says {getattr(shard, name)}; "
                    "it was changed or damaged: prepare it again"
                )
    return manifest
