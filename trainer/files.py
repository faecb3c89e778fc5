"""Files that are whole or absent: written beside the target, flushed to the disk, then renamed."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trainer.errors import UserError

PARTIAL = ".partial"
MIN_AGE = 60.0  # seconds before a partial file without a writer counts as left behind


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error.

    Raises:
        UserError: If the file cannot be written (a full disk, no permission); `path` is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # it or its folder does not exist
            temporary.unlink()


def check_can_make(folder: Path, hint: str) -> None:
    """Refuse a folder that cannot be made, or in which no file can be.

    Args:
        folder: The folder; need not exist.
        hint: What to do about it, for the error.

    Raises:
        UserError: If a part of its path is a file, or the part that exists cannot be written.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    if not existing.is_dir():
        raise UserError(f"{existing}: is a file, not a folder; {hint}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing}: cannot be written (no permission); {hint}")


def check_replaceable(path: Path, prefixes: tuple[str, ...], option: str) -> None:
    """Refuse to replace a file that holds something else than what would be written.

    Args:
        path: The file; need not exist.
        prefixes: How such a file may begin.
        option: Which option names it, for the error.

    Raises:
        UserError: If it is a file that is not empty and begins otherwise, or no file.
    """
    try:
        with path.open("rb") as file:
            found = file.read(max(map(len, prefixes)))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be replaced ({error.strerror}); choose another name") from error
    if found and not found.startswith(tuple(each.encode() for each in prefixes)):
        raise UserError(f"{option} {path}: holds something else, which would be lost; choose another name")


def remove_partials(folder: Path) -> None:
    """Remove what a killed `atomic_write` left in a folder; a file that somebody writes is locked, and stays."""
    for path in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > MIN_AGE:
                path.unlink()


def copy_file(source: Path, target: Path, sha256: str | None = None) -> None:
    """Copy a small file; the copy is whole or absent.

    Args:
        source: The file.
        target: Its copy.
        sha256: What the content must have as hexadecimal sha256.

    Raises:
        UserError: If the source cannot be read or is another file, or the copy cannot be written.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(f"{source}: is not the file that the run was made with (its sha256 differs); restore it")
    with atomic_write(target) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the platform can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cannot_read(error: PermissionError) -> UserError:
    """The error of a file that exists, but may not be read: neither missing nor damaged."""
    return UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error of a file that cannot be written, with what helps."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    is_closed = error.errno in (errno.EACCES, errno.EPERM)
    hint = "free some space" if is_full else "check the permissions" if is_closed else "choose another place"
    return UserError(f"{path}: cannot be written ({error.strerror or error}); {hint}")


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
