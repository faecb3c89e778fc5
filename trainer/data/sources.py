"""Where text comes from: a source makes a folder of token shards once, and says what lies in it."""

import ast
import hashlib
import io
import itertools
import json
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import zstandard

from trainer.data.shards import write_shard
from trainer.data.tokenizer import encode_documents, load_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.files import atomic_write, sha256_of

TRAIN_PATTERN = "*_train_*.bin"
VAL_PATTERN = "*_val_*.bin"
RECORD = "source.json"
STARTED = "source.started"


@dataclass(frozen=True)
class PreparedText:
    """Token shards in reading order, and the tokenizer that made them."""

    train: list[Path]
    val: list[Path]
    tokenizer: Path


class Source(ABC):
    """Text that can be prepared; the subclasses are the choices for `--data.source`."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the shards if they are not there yet. Called by one process only."""

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
        raise UserError(f"{folder}: there is no such data folder; set --data.source.folder to one with token shards")
    train, val = sorted(folder.glob(TRAIN_PATTERN)), sorted(folder.glob(VAL_PATTERN))
    for found, pattern in ((train, TRAIN_PATTERN), (val, VAL_PATTERN)):
        if not found:
            raise UserError(f"{folder}: holds no shard named {pattern}; prepare it or point to another folder")
    return PreparedText(train, val, tokenizer)


class Shards(Source):
    """Token shards that exist already, such as the challenge's FineWeb export."""

    def __init__(self, folder: str = "data/fineweb10B_sp1024", tokenizer: str | None = None) -> None:
        """Use the shards of a folder as they are.

        Args:
            folder: Folder with `*_train_*.bin` and `*_val_*.bin`.
            tokenizer: SentencePiece model; default: `tokenizer.model` in the folder.
        """
        self.folder = Path(folder)
        self.tokenizer = Path(tokenizer) if tokenizer else self.folder / "tokenizer.model"

    def prepare(self) -> None:
        """Nothing to make."""

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.tokenizer)


class LocalText(Source):
    """Your own text: JSON lines with a `text` field (`.jsonl`, `.jsonl.zst`) or plain `.txt`, one shard a file."""

    def __init__(
        self,
        train_files: list[str],
        val_files: list[str],
        folder: str,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
    ) -> None:
        """Tokenise files into a folder of shards.

        Args:
            train_files: Training files, in reading order.
            val_files: Validation files.
            folder: Where the shards go; made anew when the files or the tokenizer change.
            tokenizer: SentencePiece model; default: one is trained on the training files.
            vocab_size: Pieces of a tokenizer trained here.
        """
        self.files = {"train": [Path(name) for name in train_files], "val": [Path(name) for name in val_files]}
        self.folder = Path(folder)
        self.given_tokenizer = Path(tokenizer) if tokenizer else None
        self.vocab_size = vocab_size

    def prepare(self) -> None:
        """Tokenise every file, unless the folder records that this was done."""
        for path in itertools.chain(*self.files.values()):
            if not path.is_file():
                raise UserError(f"{path}: there is no such text file; check data.source")
        record: dict[str, object] = {
            "source": "LocalText",
            "files": {
                split: [[str(path), path.stat().st_size] for path in paths] for split, paths in self.files.items()
            },
            "tokenizer": sha256_of(self.given_tokenizer) if self.given_tokenizer else self.vocab_size,
        }
        if _is_recorded(self.folder, record):
            return
        _clear(self.folder)
        print(f"tokenising {sum(map(len, self.files.values()))} files into {self.folder}", flush=True)
        model = self.folder / "tokenizer.model"
        if self.given_tokenizer:
            load_tokenizer(self.given_tokenizer)
            with atomic_write(model) as file:
                file.write(self.given_tokenizer.read_bytes())
        else:
            documents = itertools.chain.from_iterable(map(read_documents, self.files["train"]))
            train_tokenizer(_sentences(documents), self.vocab_size, model, os.cpu_count() or 1)
        for split, paths in self.files.items():
            for index, path in enumerate(paths):
                _write_documents(read_documents(path), model, self.folder / f"text_{split}_{index:06d}.bin")
        _write_record(self.folder, record)

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.folder / "tokenizer.model")


class PythonDocumentation(Source):
    """Python's own documentation: the docstrings of the standard library and of the installed packages.

    Real English that every machine with Python already has, so the first run downloads nothing.
    """

    def __init__(
        self,
        folder: str = "data/python-documentation",
        vocab_size: int = 1024,
        max_bytes: int = 10_000_000,
        val_every: int = 40,
        roots: list[str] | None = None,
    ) -> None:
        """Collect docstrings; a document is a stretch of a module's.

        Args:
            folder: Where the shards go; made anew when these arguments change.
            vocab_size: Pieces of the tokenizer trained on them.
            max_bytes: Stop collecting at this many bytes of text.
            val_every: About one document in this many is for validation, chosen by the hash of its text.
            roots: Folders with Python files; default: the standard library, then the installed packages.
        """
        paths = sysconfig.get_paths()
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.max_bytes = max_bytes
        self.val_every = val_every
        self.roots = [Path(root) for root in (roots or [paths["stdlib"], paths["purelib"]])]

    def prepare(self) -> None:
        """Collect, train the tokenizer, tokenise; unless the folder records that this was done."""
        record: dict[str, object] = {
            "source": "PythonDocumentation, by stretches",
            "vocab_size": self.vocab_size,
            "max_bytes": self.max_bytes,
            "val_every": self.val_every,
            "roots": [str(root) for root in self.roots],
        }
        if _is_recorded(self.folder, record):
            return
        _clear(self.folder)
        print(f"collecting Python's own documentation into {self.folder}", flush=True)
        splits: dict[str, list[str]] = {"train": [], "val": []}
        for document in itertools.chain.from_iterable(map(_stretches, self._modules())):
            splits["val" if _text_hash(document) % self.val_every == 0 else "train"].append(document)
        for split, documents in splits.items():
            if not documents:
                places = ", ".join(map(str, self.roots))
                raise UserError(f"{places}: too few docstrings found for the {split} split; use another data.source")
            # Neighbours in one module are alike: a small batch of them would be many times the same lesson.
            documents.sort(key=_text_hash)
        model = self.folder / "tokenizer.model"
        train_tokenizer(_sentences(splits["train"]), self.vocab_size, model, os.cpu_count() or 1)
        for split, documents in splits.items():
            _write_documents(documents, model, self.folder / f"pydoc_{split}_000000.bin")
        _write_record(self.folder, record)

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.folder / "tokenizer.model")

    def _modules(self) -> Iterator[list[str]]:
        """Docstrings of modules that have at least a paragraph, each text once, in an order fixed by the paths."""
        files: list[Path] = []
        for root in self.roots:
            inside = (path for path in root.rglob("*.py") if "site-packages" not in path.relative_to(root).parts)
            files += sorted(inside, key=partial(_path_hash, root=root))
        seen: set[str] = set()
        total = 0
        workers = os.cpu_count() or 1
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for batch in _batches(files, 128 * workers):
                for docstrings in pool.map(docstrings_of, batch, chunksize=32):
                    fresh = [text for text in docstrings if text not in seen]
                    seen.update(fresh)
                    if sum(map(len, fresh)) >= 200:
                        yield fresh
                        total += sum(len(text.encode()) for text in fresh)
                    if total >= self.max_bytes:
                        pool.shutdown(cancel_futures=True)
                        return


def _stretches(docstrings: list[str], longest: int = 1000) -> Iterator[str]:
    """Join neighbours into documents of at most so many characters, where one is not longer itself."""
    waiting = ""
    for text in docstrings:
        if waiting and len(waiting) + len(text) > longest:
            yield waiting
            waiting = ""
        waiting += f"\n\n{text}" if waiting else text
    if waiting:
        yield waiting


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _batches(items: list[Path], size: int) -> Iterator[list[Path]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _path_hash(path: Path, root: Path) -> bytes:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


def docstrings_of(path: Path) -> list[str]:
    """Docstrings of a Python file in source order; none if it cannot be read or parsed."""
    try:
        source = path.read_bytes()
        if b'"""' not in source:
            return []
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # other people's files: templates, Python 2, deliberately broken test data
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if text and _is_clean(text)]


def _is_clean(text: str) -> bool:
    return not any((ord(letter) < 32 and letter not in "\n\t") or 0xD800 <= ord(letter) <= 0xDFFF for letter in text)


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a `.jsonl`, `.jsonl.zst` or `.txt` file.

    Raises:
        UserError: If the file is of another kind or a line is not a JSON object with a `text`.
    """
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".zst" else path.suffix
    if kind == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    if kind not in (".jsonl", ".jsonl.zst"):
        raise UserError(f"{path}: only .txt, .jsonl and .jsonl.zst are read")
    with path.open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file) if kind == ".jsonl.zst" else file
        for number, line in enumerate(io.TextIOWrapper(raw, encoding="utf-8"), start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number} is not a JSON object with a `text` field") from error
            yield text


def _sentences(documents: Iterable[str], longest: int = 2000) -> Iterator[str]:
    """Lines for the tokenizer's training, cut where they would be dropped for their length."""
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), longest):
                yield line[start : start + longest]


def _write_documents(documents: Iterable[str], model: Path, path: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokens = list(encode_documents(tokenizer, documents, os.cpu_count() or 1))
    write_shard(path, np.concatenate(tokens) if tokens else np.zeros(0, np.uint16))


def _is_recorded(folder: Path, record: dict[str, object]) -> bool:
    try:
        return bool(json.loads((folder / RECORD).read_text()) == record)
    except (OSError, ValueError):
        return False


def _clear(folder: Path) -> None:
    """Take away what an earlier preparation made, its record first, so that a half-made folder is never believed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).exists() and list_any_shard(folder) and not (folder / STARTED).exists():
        raise UserError(f"{folder}: holds shards that were not made here; choose another data.source.folder")
    (folder / STARTED).touch()
    (folder / RECORD).unlink(missing_ok=True)
    for path in list_any_shard(folder):
        path.unlink()


def _write_record(folder: Path, record: dict[str, object]) -> None:
    with atomic_write(folder / RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())
    (folder / STARTED).unlink(missing_ok=True)


def list_any_shard(folder: Path) -> list[Path]:
    """Every file that looks like a shard."""
    return [*folder.glob(TRAIN_PATTERN), *folder.glob(VAL_PATTERN)]
