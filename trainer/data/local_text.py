"""Your own text: files tokenized into a folder of shards."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.data.documents import FIELD, TextFiles, find_files
from trainer.data.manifest import TOKENIZER, Manifest
from trainer.data.normalization import DocumentKeys
from trainer.data.preparation import check_folder, is_prepared, prepare_folder
from trainer.data.shard_writer import SHARD_TOKENS, Document, split_of, tokenize
from trainer.data.source import SAMPLE_BYTES, PreparedText, Source, list_shards, size_option, train_for_source
from trainer.data.tokenizer import check_case_markup, check_trainable_size, load_tokenizer
from trainer.errors import UserError
from trainer.files import copy_file, sha256_of
from trainer.logging import counted, logger


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
            vocab_size: Vocabulary size of a tokenizer that is trained here (261 to 65,536), so not beside
                `tokenizer`. null: the model's.
            shard_tokens: Most tokens of a shard.
            field: Field of a .jsonl line, or column of a .parquet file, that holds the text.
        """
        if tokenizer and vocab_size is not None:
            raise UserError(
                f"data.source.tokenizer {tokenizer} has its own vocabulary, so data.source.vocab_size {vocab_size:,} "
                "cannot be chosen; leave one of the two out"
            )
        self.field = field
        self.train_files = [train_files] if isinstance(train_files, str) else train_files
        self.val_files = [val_files] if isinstance(val_files, str) else val_files
        self.val_every = val_every
        self.is_folder_given = folder is not None
        self.folder = Path(folder or _folder_of(self.train_files[0] if self.train_files else "text"))
        self.given_tokenizer = Path(tokenizer) if tokenizer else None
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens

    def check(self) -> None:
        """Refuse settings that cannot be used, files that are not there, and a folder that is not ours."""
        self._check_settings()
        record = self._record(*self._find_files())
        if not self.is_folder_given:
            self._refuse_shards_of_others(record)
        check_folder(self.folder, record)

    def is_prepared(self) -> bool:
        """Whether the manifest names these files and settings."""
        return is_prepared(self.folder, self._record(*self._find_files()))

    def known_vocab_size(self) -> int | None:
        """That of the tokenizer that is given, or that is asked for."""
        self._check_settings()
        return int(load_tokenizer(self.given_tokenizer).get_piece_size()) if self.given_tokenizer else self.vocab_size

    def _check_settings(self) -> None:
        if self.val_every < 2:
            raise UserError(f"data.source.val_every must be at least 2, not {self.val_every}")
        if self.given_tokenizer:
            check_case_markup(self.given_tokenizer, load_tokenizer(self.given_tokenizer), self.case_markup)
        else:
            check_trainable_size(self.vocab_size or self.model_vocab_size, size_option(self.vocab_size))

    def _find_files(self) -> tuple[list[Path], list[Path]]:
        """The files for training and for validation."""
        try:
            val = [] if self.val_files is None else find_files(self.val_files, "--data.source.val_files")
            return find_files(self.train_files), val
        except UserError as error:
            if Manifest.read(self.folder) is None:
                raise
            raise UserError(
                f"{error}; the shards in {self.folder} were made before: to train on them as they are, use "
                f"--data.source Shards --data.source.folder {self.folder}"
            ) from error

    def prepare(self, only_if_missing: bool = False) -> None:
        """Tokenize every file, unless the manifest says that this was done."""
        self._check_settings()
        try:
            train, val = self._find_files()
        except UserError:
            if only_if_missing and Manifest.read(self.folder) is not None:
                return
            raise
        record = self._record(train, val)
        if not self.is_folder_given:
            self._refuse_shards_of_others(record)
        prepare_folder(self.folder, record, lambda folder: self._make(folder, record, train, val), only_if_missing)

    def _record(self, train: list[Path], val: list[Path]) -> dict[str, object]:
        """What the manifest says of the source."""
        return {
            "class": "LocalText",
            "train_files": [_file_state(path) for path in train],
            "val_files": [_file_state(path) for path in val],
            "val_every": self.val_every,
            "field": self.field,
            "tokenizer": sha256_of(self.given_tokenizer)
            if self.given_tokenizer
            else self.vocab_size or self.model_vocab_size,
            # Folders of before this setting are kept as they are.
            **({"case_markup": False} if self.case_markup is False and not self.given_tokenizer else {}),
            "shard_tokens": self.shard_tokens,
        }

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
            train_for_source(model, texts, self.vocab_size, self.model_vocab_size, self.case_markup is not False)

    def prepared(self) -> PreparedText:
        """The shards of the folder."""
        return list_shards(self.folder, self.folder / TOKENIZER)


def _file_state(path: Path) -> list[str | int]:
    """Path, size and time of change, which tell whether a file was changed."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


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


def _beginning(path: Path, field: str, size: int, split: Callable[[str], str | None]) -> Iterator[str]:
    """The first training documents of a file, of about `size` bytes, at least one if there is one."""
    total = 0
    for text in TextFiles([path], field):
        if split(text) == "train":
            yield text
            total += len(text.encode())
        if total >= size:
            return
