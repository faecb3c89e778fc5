"""Sources of text: each makes a folder of token shards once, and lists the shards in it."""

import ast
import hashlib
import itertools
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainer.data.documents import FIELD, TextFiles, find_files
from trainer.data.manifest import NAME, TOKENIZER, Manifest
from trainer.data.normalization import DocumentKeys
from trainer.data.preparation import prepare_folder
from trainer.data.shard_writer import PROGRESS_SECONDS, SHARD_TOKENS, Document, split_of, tokenize
from trainer.data.tokenizer import check_trainable_size, load_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.files import copy_file, sha256_of
from trainer.logging import counted, logger
from trainer.progress_display import open_display

TRAIN_PATTERN = "*_train_*.bin"
VAL_PATTERN = "*_val_*.bin"
SAMPLE_BYTES = 50_000_000  # of training text, for a tokenizer
MAX_READERS = 4  # processes; each imports the main module, which on many cores takes longer than the reading


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
    """

    model_vocab_size = 1024

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
            f"{folder}: is not a folder; prepare it (trainer fit does so, and trainer prepare), or name one with token "
            "shards with --data.source.folder"
        )
    train, val = sorted(folder.glob(TRAIN_PATTERN)), sorted(folder.glob(VAL_PATTERN))
    for shards, pattern in ((train, TRAIN_PATTERN), (val, VAL_PATTERN)):
        if not shards:
            raise UserError(f"{folder}: holds no shard named {pattern}; prepare it or name another folder")
    if (manifest := Manifest.read(folder)) is not None:
        listed, present = {shard.file for shard in manifest.shards}, {path.name for path in (*train, *val)}
        for name in sorted(listed - present):
            raise UserError(f"{folder / name}: is missing, but the folder's {NAME} lists it; prepare the folder again")
        for name in sorted(present - listed):
            raise UserError(f"{folder / name}: is not listed in the folder's {NAME}; remove it")
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
        self.tokenizer = Path(tokenizer) if tokenizer else self.folder / TOKENIZER

    def prepare(self, only_if_missing: bool = False) -> None:
        """Do nothing: the shards exist."""

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.tokenizer)


def _file_state(path: Path) -> list[str | int]:
    """Path, size and time of change, which tell whether a file was changed."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


class LocalText(Source):
    """Your own text: `.txt`, `.md` (one document per file), `.jsonl` (a field per line), `.parquet` (a column).

    Each may be compressed as `.gz`, `.zst` or `.xz`.
    """

    def __init__(
        self,
        train_files: list[str] | str,
        folder: str | None = None,
        val_files: list[str] | str | None = None,
        val_every: int = 100,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        shard_tokens: int = SHARD_TOKENS,
        field: str = FIELD,
    ) -> None:
        """Tokenize files into a folder of shards.

        Args:
            train_files: Files, folders and glob patterns with training text, in reading order.
            folder: Folder for the shards; it is made again when the files or these settings change. null: a folder in
                `data`, named after the first of the files.
            val_files: Files, folders and glob patterns with validation text. Training documents that are among them,
                also with other case or spacing, are left out. null: a part of the training documents becomes the
                validation split.
            val_every: Without val_files, about one document in this many goes to the validation split, chosen by the
                sha256 of its text (at least 2). Of fewer than twice as many documents, the last tenth of the text does.
            tokenizer: SentencePiece model. null: one is trained on the first 50 MB of the training split, an equal part
                of each file.
            vocab_size: Vocabulary size of a tokenizer that is trained here (261 to 65,536). null: the model's.
            shard_tokens: Most tokens of a shard.
            field: Field of a .jsonl line, or column of a .parquet file, that holds the text.
        """
        self.field = field
        self.train_files = [train_files] if isinstance(train_files, str) else train_files
        self.val_files = [val_files] if isinstance(val_files, str) else val_files
        self.val_every = val_every
        self.is_folder_given = folder is not None
        self.folder = Path(folder or _folder_of(self.train_files[0] if self.train_files else "text"))
        self.given_tokenizer = Path(tokenizer) if tokenizer else None
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens

    def prepare(self, only_if_missing: bool = False) -> None:
        """Tokenize every file, unless the manifest says that this was done."""
        if self.val_every < 2:
            raise UserError(f"data.source.val_every must be at least 2, not {self.val_every}")
        if self.given_tokenizer:
            load_tokenizer(self.given_tokenizer)
        else:
            check_trainable_size(self.vocab_size or self.model_vocab_size, _size_option(self.vocab_size))
        try:
            train, val = find_files(self.train_files), find_files(self.val_files or [])
        except UserError as error:
            if Manifest.read(self.folder) is None:
                raise
            if only_if_missing:
                return
            raise UserError(
                f"{error}; the shards in {self.folder} were made before: to train on them as they are, use "
                f"--data.source Shards --data.source.folder {self.folder}"
            ) from error
        record: dict[str, object] = {
            "class": "LocalText",
            "train_files": [_file_state(path) for path in train],
            "val_files": [_file_state(path) for path in val],
            "val_every": self.val_every,
            "field": self.field,
            "tokenizer": sha256_of(self.given_tokenizer)
            if self.given_tokenizer
            else self.vocab_size or self.model_vocab_size,
            "shard_tokens": self.shard_tokens,
        }
        if not self.is_folder_given:
            self._refuse_shards_of_others(record)
        prepare_folder(self.folder, record, lambda folder: self._make(folder, record, train, val), only_if_missing)

    def _refuse_shards_of_others(self, record: dict[str, Any]) -> None:
        """Refuse a folder that nobody chose where it holds the shards of other files, which would be replaced."""
        manifest = Manifest.read(self.folder)
        before, now = (
            {file[0] for file in source.get("train_files", [])}
            for source in (manifest.source if manifest else record, record)
        )
        if not before & now:
            raise UserError(f"{self.folder}: holds the shards of other files; choose another data.source.folder")

    def _make(self, folder: Path, record: dict[str, object], train: list[Path], val: list[Path]) -> None:
        """Write shards and manifest into a folder."""
        model = folder / TOKENIZER
        keys = DocumentKeys(load_tokenizer(self.given_tokenizer) if self.given_tokenizer else None)
        texts = TextFiles(train, self.field)
        few = [] if val else [(text, str(train[texts.index])) for text in itertools.islice(texts, 2 * self.val_every)]
        if 0 < len(few) < 2 * self.val_every:
            self._make_of_few(folder, record, few, keys)
            return
        validation = {keys.of(text) for text in TextFiles(val, self.field)}

        def split(text: str, is_val_file: bool = False) -> str | None:
            """The split of a document; None where the validation files have it, too."""
            if is_val_file:
                return "val"
            key = keys.of(text)
            if val:
                return None if key in validation else "train"
            return split_of(key, self.val_every)

        size = SAMPLE_BYTES // len(train)
        beginnings = (_beginning(path, self.field, size, split) for path in train)
        self._make_tokenizer(model, itertools.chain.from_iterable(beginnings))
        files = TextFiles([*val, *train], self.field)
        logger.info(
            f"tokenizing {counted(len(files.paths), 'file')} ({sum(files.sizes) / 1e6:,.1f} MB) into {self.folder}"
        )
        documents = (
            Document(split(text, files.index < len(val)), text, str(files.paths[files.index])) for text in files
        )
        tokenize(documents, model, folder, record, lambda: files.fraction, self.shard_tokens)

    def _make_of_few(
        self, folder: Path, record: dict[str, object], texts: list[tuple[str, str]], keys: DocumentKeys
    ) -> None:
        """Write shards of a few documents, given with their files: the last tenth of their text is for validation."""
        train, val = split_last_tenth([text for text, _ in texts])
        origins = [origin for _, origin in texts]
        start = f"the last tenth of the text, from {origins[-len(val)]} on"
        logger.info(f"few texts ({counted(len(texts), 'document')}): the validation split is {start}")
        validation = {keys.of(text) for text in val}
        documents = [
            Document(None if keys.of(text) in validation else "train", text, origin)
            for text, origin in zip(train, origins, strict=False)
        ]
        documents += [Document("val", text, origin) for text, origin in zip(val, origins[-len(val) :], strict=True)]
        model = folder / TOKENIZER
        self._make_tokenizer(model, (document.text for document in documents if document.split == "train"))
        tokenize(documents, model, folder, record, shard_tokens=self.shard_tokens)

    def _make_tokenizer(self, model: Path, texts: Iterable[str]) -> None:
        """Copy the tokenizer that was given, or train one on training text."""
        if self.given_tokenizer:
            copy_file(self.given_tokenizer, model)
        else:
            _train(model, texts, self.vocab_size, self.model_vocab_size)

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.folder / TOKENIZER)


class PythonDocumentation(Source):
    """Python's own documentation: the docstrings of the standard library and of the installed packages.

    It is real English that every machine with Python has, so the first run downloads nothing.
    """

    def __init__(
        self,
        folder: str = "data/python-documentation",
        vocab_size: int | None = None,
        max_bytes: int = 10_000_000,
        val_every: int = 40,
        roots: list[str] | None = None,
    ) -> None:
        """Collect docstrings; a document joins a few neighbors of one module.

        Args:
            folder: Folder for the shards; it is made again when these settings change.
            vocab_size: Vocabulary size of the tokenizer that is trained on the text (261 to 65,536). null: the model's.
            max_bytes: Stop collecting at this many bytes of text.
            val_every: About one document in this many goes to the validation split, chosen by its sha256 (at least 2).
            roots: Folders with Python files. null: the standard library, then the installed packages.
        """
        paths = sysconfig.get_paths()
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.max_bytes = max_bytes
        self.val_every = val_every
        self.roots = [Path(root) for root in (roots or [paths["stdlib"], paths["purelib"]])]

    def prepare(self, only_if_missing: bool = False) -> None:
        """Collect docstrings, train the tokenizer and tokenize, unless the manifest says that this was done."""
        if self.val_every < 2:
            raise UserError(f"data.source.val_every must be at least 2, not {self.val_every}")
        check_trainable_size(self.vocab_size or self.model_vocab_size, _size_option(self.vocab_size))
        record: dict[str, object] = {
            "class": "PythonDocumentation",
            "vocab_size": self.vocab_size or self.model_vocab_size,
            "max_bytes": self.max_bytes,
            "val_every": self.val_every,
            "roots": [str(root) for root in self.roots],
        }
        prepare_folder(self.folder, record, lambda folder: self._make(folder, record), only_if_missing)

    def _make(self, folder: Path, record: dict[str, object]) -> None:
        """Write shards and manifest into a folder."""
        logger.info(f"collecting Python's own documentation into {self.folder}")
        documents = list(itertools.chain.from_iterable(map(_join_neighbors, self._modules())))
        # Neighbors in one module are alike: a small batch of them would hold the same text many times.
        documents.sort(key=_text_hash)
        keys = DocumentKeys()
        splits = [Document(split_of(keys.of(text), self.val_every), text, "the documentation") for text in documents]
        train = [document.text for document in splits if document.split == "train"]
        if not train or len(train) == len(splits):
            roots = ", ".join(map(str, self.roots))
            raise UserError(f"{roots}: too few docstrings for two splits; use another data.source")
        _train(folder / TOKENIZER, train, self.vocab_size, self.model_vocab_size)
        logger.info(f"tokenizing {counted(len(splits), 'document')}")
        tokenize(splits, folder / TOKENIZER, folder, record)

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.folder / TOKENIZER)

    def _modules(self) -> Iterator[list[str]]:
        """Docstrings of modules with at least a paragraph of them, each once, in an order that the paths determine."""
        files: list[Path] = []
        for root in self.roots:
            inside = (path for path in root.rglob("*.py") if "site-packages" not in path.relative_to(root).parts)
            files += sorted(inside, key=partial(_path_hash, root=root))
        seen: set[str] = set()
        total = 0
        display = open_display("auto", PROGRESS_SECONDS)
        workers = min(os.cpu_count() or 1, MAX_READERS)
        with closing(display), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for batch in _batches(files, 128 * workers):
                display.update_task("collecting", min(total, self.max_bytes), self.max_bytes)
                for docstrings in pool.map(docstrings_of, batch, chunksize=32):
                    fresh = [text for text in docstrings if text not in seen]
                    seen.update(fresh)
                    if sum(map(len, fresh)) >= 200:
                        yield fresh
                        total += sum(len(text.encode()) for text in fresh)
                    if total >= self.max_bytes:
                        pool.shutdown(cancel_futures=True)
                        return


def _folder_of(name: str) -> str:
    """Where the shards of a text go: `texts`, `texts/` and `texts/*.jsonl` are prepared in `data/texts`."""
    path = Path(name)
    while any(letter in path.name for letter in "*?["):
        path = path.parent
    stem = path.resolve().name if path.is_dir() else path.name.partition(".")[0]
    folder = Path("data") / (stem or "text")
    holds_text = path.resolve() == folder.resolve() or folder.resolve() in path.resolve().parents
    return f"{folder}-shards" if holds_text else str(folder)


def split_last_tenth(texts: list[str]) -> tuple[list[str], list[str]]:
    """Split a text, given as its documents, where nine tenths of its characters end.

    The document in which that is gets cut after a line if one ends within the last fiftieth of the text before, else
    after a word, else anywhere.
    """
    train: list[str] = []
    total = sum(map(len, texts))
    left = total * 9 // 10
    for index, text in enumerate(texts):
        if len(text) > left:
            start = max(left - total // 50, 0)
            ends = (text.rfind(letter, start, left + 1) for letter in "\n ")
            cut = next((end for end in ends if end > 0), left)
            head, tail = text[:cut], text[cut:]
            return [*train, *([head] if head.strip() else [])], [tail, *texts[index + 1 :]]
        train.append(text)
        left -= len(text)
    return train[:-1], train[-1:]


def _train(model: Path, texts: Iterable[str], vocab_size: int | None, model_vocab_size: int) -> None:
    """Train a tokenizer; an error names the option that sets its size."""
    size = vocab_size or model_vocab_size
    logger.info(f"training a tokenizer with a vocabulary of {size:,}")
    train_tokenizer(_sentences(texts), size, model, os.cpu_count() or 1, f"--{_size_option(vocab_size)}")


def _size_option(vocab_size: int | None) -> str:
    """The option that says how large the vocabulary of a tokenizer is."""
    return "model.vocab_size" if vocab_size is None else "data.source.vocab_size"


def _join_neighbors(docstrings: list[str], max_length: int = 1000) -> Iterator[str]:
    """Join neighbors into documents of at most `max_length` characters, where one is not longer itself."""
    document = ""
    for text in docstrings:
        if document and len(document) + len(text) > max_length:
            yield document
            document = ""
        document += f"\n\n{text}" if document else text
    if document:
        yield document


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
    return not any(
        (ord(character) < 32 and character not in "\n\t") or 0xD800 <= ord(character) <= 0xDFFF for character in text
    )


def _beginning(path: Path, field: str, size: int, split: Callable[[str], str | None]) -> Iterator[str]:
    """The first training documents of a file, of about `size` bytes, at least one if there is one."""
    total = 0
    for text in TextFiles([path], field):
        if split(text) == "train":
            yield text
            total += len(text.encode())
        if total >= size:
            return


def _sentences(documents: Iterable[str], max_length: int = 2000) -> Iterator[str]:
    """Lines for training a tokenizer, cut where SentencePiece would drop them for their length."""
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), max_length):
                yield line[start : start + max_length]
