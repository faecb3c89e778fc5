"""The shard format of the challenge, reading and writing.

A shard is 256 little-endian int32 (`20240520, 1, n_tokens, 0, ...`) and then n_tokens little-endian uint16.
Source: openai/parameter-golf, which took it from modded-nanogpt.
"""

import errno
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.files import atomic_write

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 2**16

TokenArray = np.ndarray[tuple[int], np.dtype[np.uint16]]


def write_shard(path: str | Path, tokens: TokenArray) -> None:
    """Write one shard; it appears under its name only when it is complete.

    Args:
        path: Where the shard goes.
        tokens: (n,) uint16.
    """
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"tokens must be a flat uint16 array, not {tokens.dtype} of shape {tokens.shape}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2", copy=False).data)  # not a copy: a shard is 200 MB


def open_shard(path: str | Path) -> TokenArray:
    """Map a shard into memory after checking its header against its size.

    Returns:
        (n,) uint16, read-only, backed by the file.

    Raises:
        UserError: If it is not a whole, non-empty shard.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise _cannot_open(path, error) from error
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise UserError(f"{path}: is not a token shard (its header does not start with {MAGIC}); remove or replace it")
    if header[1] != VERSION:
        raise UserError(f"{path}: has shard version {header[1]}, but only version {VERSION} is known")
    n_tokens = int(header[2])
    expected = HEADER_BYTES + 2 * n_tokens
    if size != expected:
        raise UserError(
            f"{path}: header promises {n_tokens:,} tokens ({expected:,} bytes) but the file has {size:,} bytes; "
            "it was truncated or damaged: delete it and prepare it again"
        )
    if n_tokens <= 0:
        raise UserError(f"{path}: holds no tokens; delete it and prepare it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))


class TokenFiles:
    """Several shards as one long row of tokens, without reading them into memory."""

    def __init__(self, paths: Sequence[str | Path], held_out: int = 0) -> None:
        """Open the shards.

        Args:
            paths: Shards in reading order.
            held_out: Number of tokens at the end that do not count.

        Raises:
            UserError: If there is none, one is damaged, or no token is left.
        """
        if not paths:
            raise UserError("no token shards to read; prepare the data first")
        self.paths = [Path(path) for path in paths]
        self._lengths = [len(open_shard(path)) for path in paths]
        # Not from mapped memory: access beyond the end of a file that was cut meanwhile kills the process silently. A
        # read comes back short instead.
        self._files = [_opened(path) for path in self.paths]
        self.ends = np.cumsum(self._lengths)
        self._length = int(self.ends[-1]) - held_out
        if self._length < 1 and held_out:
            raise UserError(
                f"data.held_out_tokens {held_out:,}: the training text has {self.total:,} tokens; hold out fewer"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def total(self) -> int:
        """All tokens, with those that are held out."""
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> TokenArray:
        """Copy `count` tokens from position `start`, continuing with the first token after the last.

        Returns:
            (count,) uint16.

        Raises:
            UserError: If a shard was cut or removed since it was opened.
        """
        return self._read(start % len(self), count, len(self))

    def read_held_out(self) -> TokenArray:
        """The tokens that are held out, (held_out,) uint16."""
        return self._read(len(self), self.total - len(self), self.total)

    def _read(self, position: int, count: int, end: int) -> TokenArray:
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            index = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - int(self.ends[index] - self._lengths[index])
            length = min(count - filled, self._lengths[index] - offset, end - position)
            block = os.pread(self._files[index].fileno(), 2 * length, HEADER_BYTES + 2 * offset)
            self._check_unchanged(index, len(block) == 2 * length)
            out[filled : filled + length] = np.frombuffer(block, dtype="<u2")
            filled += length
            position = (position + length) % end
        return out

    def _check_unchanged(self, index: int, is_whole: bool) -> None:
        """Refuse a shard that was cut or replaced: a read came back short, or the file has another size."""
        path, expected = self.paths[index], HEADER_BYTES + 2 * self._lengths[index]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: existed when the run began, but not now ({error.strerror})") from error
        if size != expected or not is_whole:
            raise UserError(
                f"{path}: had {expected:,} bytes when the run began, but has {size:,} now; prepare it again"
            )


def _opened(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _cannot_open(path, error) from error


def _cannot_open(path: Path, error: OSError) -> UserError:
    hint = "raise the limit with `ulimit -n 4096`" if error.errno == errno.EMFILE else "check its permissions"
    return UserError(f"{path}: cannot be opened ({error.strerror}); {hint}")


def check_vocab_size(tokenizer: Path, vocab_size: int) -> None:
    """Refuse a tokenizer whose tokens do not fit into 16 bits.

    Raises:
        UserError: If its vocabulary is larger than 65,536.
    """
    if vocab_size > MAX_VOCAB:
        raise UserError(
            f"{tokenizer}: has a vocabulary of {vocab_size:,} tokens, but shards support at most {MAX_VOCAB:,}; use "
            "another tokenizer"
        )
