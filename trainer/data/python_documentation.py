"""Text that every machine with Python has: its own documentation."""

import ast
import hashlib
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from trainer.data.manifest import TOKENIZER
from trainer.data.normalization import DocumentKeys
from trainer.data.preparation import check_folder, is_prepared, prepare_folder
from trainer.data.shard_writer import PROGRESS_SECONDS, Document, split_of, tokenize
from trainer.data.source import PreparedText, Source, list_shards, size_option, train_for_source
from trainer.data.tokenizer import check_trainable_size
from trainer.errors import UserError
from trainer.logging import counted, logger
from trainer.progress_display import open_display

MAX_READERS = 4  # processes; to start more takes longer than the reading


class PythonDocumentation(Source):
    """Python's own documentation: the docstrings of the standard library and of the installed packages.

    It is real English that every machine with Python has, so the first run downloads nothing.
    """

    def __init__(
        self,
        folder: str = "data/python-documentation",
        max_bytes: int = 10_000_000,
        vocab_size: int | None = None,
        val_every: int = 40,
        roots: list[str] | None = None,
    ) -> None:
        """Collect docstrings; a document joins a few neighbors of one module.

        Args:
            folder: Folder for the shards; it is made again when these settings change.
            max_bytes: Stop collecting at this many bytes of text.
            vocab_size: Vocabulary size of the tokenizer that is trained on the text (261 to 65,536). null: the model's.
            val_every: About one document in this many goes to the validation split, chosen by its sha256 (at least 2).
            roots: Folders with Python files. null: the standard library, then the installed packages.
        """
        paths = sysconfig.get_paths()
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.max_bytes = max_bytes
        self.val_every = val_every
        self.roots = [Path(root) for root in (roots or [paths["stdlib"], paths["purelib"]])]

    def check(self) -> None:
        """Refuse settings that cannot be used, and a folder that is not ours."""
        self._check_settings()
        check_folder(self.folder, self._record())

    def is_prepared(self) -> bool:
        """Whether the manifest names these settings."""
        return is_prepared(self.folder, self._record())

    def _check_settings(self) -> None:
        if self.val_every < 2:
            raise UserError(f"data.source.val_every must be at least 2, not {self.val_every}")
        check_trainable_size(self.vocab_size or self.model_vocab_size, size_option(self.vocab_size))

    def known_vocab_size(self) -> int | None:
        """That of the tokenizer that is asked for."""
        self._check_settings()
        return self.vocab_size

    def prepare(self, only_if_missing: bool = False) -> None:
        """Collect docstrings, train the tokenizer and tokenize, unless the manifest says that this was done."""
        self._check_settings()
        record = self._record()
        prepare_folder(self.folder, record, lambda folder: self._make(folder, record), only_if_missing)

    def _record(self) -> dict[str, object]:
        """What the manifest says of the source."""
        return {
            "class": "PythonDocumentation",
            "vocab_size": self.vocab_size or self.model_vocab_size,
            "max_bytes": self.max_bytes,
            "val_every": self.val_every,
            "roots": [str(root) for root in self.roots],
            # Folders of before this setting are kept as they are.
            **({"case_markup": False} if self.case_markup is False else {}),
        }

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
        train_for_source(
            folder / TOKENIZER, train, self.vocab_size, self.model_vocab_size, self.case_markup is not False
        )
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
                with _hidden_main():
                    results = pool.map(docstrings_of, batch, chunksize=32)
                for docstrings in results:
                    fresh = [text for text in docstrings if text not in seen]
                    seen.update(fresh)
                    if sum(map(len, fresh)) >= 200:
                        yield fresh
                        total += sum(len(text.encode()) for text in fresh)
                    if total >= self.max_bytes:
                        pool.shutdown(cancel_futures=True)
                        return


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Start processes that do not run the main module again, as `spawn` lets them.

    A user's script that trains at its top level would train again in each of them, and wait for itself.
    """
    main = vars(sys.modules["__main__"])
    saved: dict[str, object] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(saved)


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
