"""Documents of text files: a `.txt` or `.md` file, a line of `.jsonl`, a row of `.parquet`; each also compressed."""

import codecs
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard
from typing_extensions import override

from trainer.errors import UserError
from trainer.logging import counted, logger

KINDS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz")
FIELD = "text"
READ_BYTES = 2**17


def find_files(names: list[str], option: str = "--data.source.train_files") -> list[Path]:
    """Resolve files, folders (all text files below them) and glob patterns, in the order of the names.

    What a folder or a pattern holds and cannot be read is named in a warning; a file is read once, also behind a link.

    Args:
        names: What the option says.
        option: Its name, for errors.

    Raises:
        UserError: If there is no name, a name matches nothing, or a file is of another kind.
    """
    if not names:
        raise UserError(f"{option}: names no file; give one, a folder or a pattern")
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            matches = _files_below(path)
        elif not path.is_file() and any(letter in name for letter in "*?["):
            matches = sorted(Path(path.anchor or ".").glob(name.removeprefix(path.anchor)))
            matches = _readable(matches, name)
        else:
            matches = [path]
        if not matches and path.is_dir():
            raise UserError(f"{name}: holds no {', '.join(KINDS[:-1])} or {KINDS[-1]} file; check {option}")
        if not matches or not all(file.is_file() for file in matches):
            raise UserError(f"{name}: there is no such text file; check {option}")
        files += matches
    once = {os.path.realpath(file): file for file in reversed(files)}
    if len(once) < len(files):
        files = [file for file in dict.fromkeys(files) if once[os.path.realpath(file)] == file]
        logger.warning(f"{option}: names some files more than once; each is read once")
    for file in files:
        if _kind(file) not in KINDS:
            raise UserError(f"{file}: only {', '.join(KINDS)} are read, each also as {', '.join(COMPRESSIONS)}")
    return files


def _files_below(folder: Path) -> list[Path]:
    """All text files below a folder, also behind links; what is not read is named in a warning."""
    unreadable: list[str] = []
    seen: set[str] = set()
    files: list[Path] = []
    for root, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: unreadable.append(error.filename)
    ):
        if (real := os.path.realpath(root)) in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        files += [Path(root) / name for name in names]
    if unreadable:
        logger.warning(f"{folder}: {len(unreadable):,} folders in it cannot be read: {_listed(unreadable)}")
    return _readable(sorted(files), str(folder))


def _readable(files: list[Path], name: str) -> list[Path]:
    """The text files among some files that are not empty; the others are named in a warning."""
    others = [file for file in files if not (file.is_file() and _kind(file) in KINDS)]
    empty = [file for file in files if file not in set(others) and file.stat().st_size == 0]
    for left_out, reason in ((others, f"not named {', '.join(KINDS[:-1])} or {KINDS[-1]}"), (empty, "empty")):
        if left_out:
            logger.warning(
                f"{name}: {counted(len(left_out), 'file')} left out, {reason}: {_listed(map(str, left_out))}"
            )
    return [file for file in files if file not in {*others, *empty}]


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3:,} more" if len(first) > 3 else "")


def _kind(path: Path) -> str:
    """The ending that tells what a file holds, in lowercase."""
    return Path(path.stem).suffix.lower() if _compression(path) in COMPRESSIONS else path.suffix.lower()


def _compression(path: Path) -> str:
    return path.suffix.lower()


class TextFiles:
    """The documents of files, and how much of the files has been read."""

    def __init__(self, paths: list[Path], field: str = FIELD, source_field: str | None = None) -> None:
        """Take the files; nothing is opened yet.

        Args:
            paths: Files of the supported kinds.
            field: Field of a .jsonl line, or column of a .parquet file, that holds the text.
            source_field: Field or column that says where a document comes from. None: the name of its file says it.
        """
        self.field = field
        self.source_field = source_field
        self.source = ""  # of the last document
        self.paths = paths
        self.sizes = [path.stat().st_size for path in paths]
        self.index = 0  # number of the file that the last document came from
        self._done = 0
        self._open: BinaryIO | None = None

    @property
    def fraction(self) -> float:
        """Share of the files' bytes that has been read, 0 to 1."""
        here = self._open.tell() if self._open is not None and not self._open.closed else 0
        return (self._done + here) / max(sum(self.sizes), 1)

    def __iter__(self) -> Iterator[str]:
        """Read the files one after another.

        Raises:
            UserError: If a file is empty, damaged, not UTF-8, or not what its name says.
        """
        self._done = 0
        for index, (path, size) in enumerate(zip(self.paths, self.sizes, strict=True)):
            self.index = index
            with _opened(path) as self._open:
                count = 0
                for text, source in _documents(path, self._open, self.field, self.source_field):
                    count += 1
                    self.source = str(path) if source is None else source
                    yield text
            if count == 0:
                raise UserError(f"{path}: holds no document; remove it from data.source")
            self._done += size


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _documents(path: Path, raw: BinaryIO, field: str, source_field: str | None) -> Iterator[tuple[str, str | None]]:
    """Texts, each with what its source field says."""
    kind = _kind(path)
    try:
        file = _decompressed(path, raw)
        if kind in (".txt", ".md"):
            text = file.read().decode("utf-8-sig")
            if text:
                yield text, None
        elif kind == ".jsonl":
            for number, line in enumerate(io.BufferedReader(cast(io.RawIOBase, file)), start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    yield _text_of(path, number, content, field, source_field)
        else:
            yield from _rows(path, file, field, source_field)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start} ({error.reason}); convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); it is truncated or damaged") from error


def _text_of(path: Path, number: int, line: bytes, field: str, source_field: str | None) -> tuple[str, str | None]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is not a JSON object; repair or remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: line {number} is a {type(values).__name__}, not a JSON object; repair or remove it")
    if field not in values:
        there = ", ".join(map(str, values)) or "nothing"
        raise UserError(
            f"{path}: line {number} is not a JSON object with a `{field}` field; it has {there}: name one with "
            "--data.source.field"
        )
    text = values[field]
    if not isinstance(text, str):
        raise UserError(f"{path}: the `{field}` of line {number} is not a string; name another --data.source.field")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise UserError(f"{path}: the `{field}` of line {number} holds a lone surrogate; repair it first") from error
    return text, _as_source(values.get(source_field)) if source_field else None


def _as_source(value: object) -> str:
    return "" if value is None else str(value)


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    compression = _compression(path)
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(raw), READ_BYTES))
    return raw


class _ZstdFile(io.RawIOBase):
    """Frames of zstd, one after another; zstandard's own reader takes the end of a cut file for the end of the text."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_in_frame = False
        self._rest = b""  # compressed
        self._content = memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while not self._content:
            block = self._rest or self._raw.read(READ_BYTES)
            self._rest = b""
            if not block:
                if self._is_in_frame:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._is_in_frame = True
            self._content = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._is_in_frame = False
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def _rows(path: Path, file: BinaryIO, field: str, source_field: str | None) -> Iterator[tuple[str, str | None]]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"{path}: parquet files need the package pyarrow; pip install 'golf-trainer[parquet]'"
        ) from error
    with tempfile.TemporaryFile() as whole:
        if _compression(path) in COMPRESSIONS:  # its index is at the end of the file
            shutil.copyfileobj(file, whole)
            whole.seek(0)
            file = cast(BinaryIO, whole)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = {column.name: column.type for column in table.schema_arrow}
            if field not in columns:
                raise UserError(
                    f"{path}: has no column `{field}`, but {', '.join(columns)}; name one with --data.source.field"
                )
            kind = columns[field]
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind  # of a column with few values
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(
                    f"{path}: the column `{field}` holds {columns[field]}, not text; name another --data.source.field"
                )
            has_source = source_field in columns
            number = 0
            for batch in table.iter_batches(1024, columns=[field, source_field] if has_source else [field]):
                texts = batch.column(field).to_pylist()
                sources = batch.column(source_field).to_pylist() if has_source else [""] * len(texts)
                for text, source in zip(texts, sources, strict=True):
                    number += 1
                    if text is None:
                        raise UserError(f"{path}: the `{field}` of row {number:,} is null; repair or remove the row")
                    yield text, _as_source(source) if source_field else None
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: is not a parquet file with a `{field}` column ({reason})") from error
