"""Documents of text files: a `.txt` file, a line of `.jsonl`, a row of `.parquet`; each also `.gz`, `.zst`, `.xz`."""

import gzip
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from trainer.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz")
FIELD = "text"


def find_files(names: list[str]) -> list[Path]:
    """Resolve files, folders (all text files below them) and glob patterns, in the order of the names.

    Raises:
        UserError: If a name matches nothing, or a file is of another kind.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in KINDS)
        elif any(letter in name for letter in "*?["):
            matches = sorted(file for file in Path(path.anchor or ".").glob(name.removeprefix(path.anchor)))
        else:
            matches = [path]
        if not matches or not all(file.is_file() for file in matches):
            raise UserError(f"{name}: there is no such text file; check data.source")
        files += matches
    for file in files:
        if _kind(file) not in KINDS:
            raise UserError(f"{file}: only {', '.join(KINDS)} are read, each also as {', '.join(COMPRESSIONS)}")
    return files


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


class TextFiles:
    """The documents of files, and how much of the files has been read."""

    def __init__(self, paths: list[Path]) -> None:
        """Take the files; nothing is opened yet.

        Args:
            paths: Files of the supported kinds.
        """
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
            with path.open("rb") as self._open:
                count = 0
                for text in _documents(path, self._open):
                    count += 1
                    yield text
            if count == 0:
                raise UserError(f"{path}: holds no document; remove it from data.source")
            self._done += size


def _documents(path: Path, raw: BinaryIO) -> Iterator[str]:
    kind = _kind(path)
    try:
        file = _decompressed(path, raw)
        if kind == ".txt":
            text = file.read().decode("utf-8")
            if text:
                yield text
        elif kind == ".jsonl":
            for number, line in enumerate(io.BufferedReader(cast(io.RawIOBase, file)), start=1):
                yield _text_of(path, number, line)
        else:
            yield from _rows(path, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start} ({error.reason}); convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); it is cut or damaged") from error


def _text_of(path: Path, number: int, line: bytes) -> str:
    try:
        text = json.loads(line.decode("utf-8"))[FIELD]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: line {number} is not a JSON object with a `{FIELD}` field") from error
    if not isinstance(text, str):
        raise UserError(f"{path}: the `{FIELD}` of line {number} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise UserError(f"{path}: the `{FIELD}` of line {number} holds a lone surrogate; repair it first") from error
    return text


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if path.suffix == ".zst":
        return cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False))
    return raw


def _rows(path: Path, file: BinaryIO) -> Iterator[str]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"{path}: parquet files need the package pyarrow; pip install 'golf-trainer[parquet]'"
        ) from error
    with tempfile.TemporaryFile() as whole:
        if path.suffix != ".parquet":  # its index is at the end of the file
            shutil.copyfileobj(file, whole)
            whole.seek(0)
            file = cast(BinaryIO, whole)
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024, columns=[FIELD]):
                yield from (text for text in batch.column(0).to_pylist() if text)
        except (pyarrow.ArrowException, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: is not a parquet file with a `{FIELD}` column ({reason})") from error
