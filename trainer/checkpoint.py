"""The checkpoint file: its checksum, reading it without running anything from it, and the weights it holds.

A checkpoint is torch's own zip file. Its archive comment is the sha256 of all bytes before it, so that other tools can
still load it.
"""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.files import atomic_write, cannot_read

METADATA_KEY = "golf_trainer"  # plain values that let `export` and `validate` use the file alone
AVERAGING_KEY = "WeightAveraging"  # of `callbacks`: the callback's class

COMMENT = b"sha256:"
COMMENT_BYTES = len(COMMENT) + 64
ZIP_END = b"PK\x05\x06"  # of 22 bytes with no comment; the last two are the comment's length


def append_checksum(file: BinaryIO) -> None:
    """Give a zip file that ends at the file's end its sha256 as comment."""
    file.seek(-22, os.SEEK_END)
    if file.read(4) != ZIP_END:
        raise RuntimeError("torch.save wrote no plain zip file")
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", COMMENT_BYTES))
    digest = _sha256(file, file.seek(0, os.SEEK_END))
    file.write(COMMENT + digest)


def _sha256(file: BinaryIO, count: int) -> bytes:
    """Hexadecimal sha256 of the first bytes of a file, which is then positioned behind them."""
    file.seek(0)
    sha = hashlib.sha256()
    while count:
        block = file.read(min(count, 2**20))
        if not block:
            raise OSError("it became shorter while it was read")
        sha.update(block)
        count -= len(block)
    return sha.hexdigest().encode()


def verify_checksum(path: str | Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None if its checksum is right.

    Raises:
        UserError: If it may not be read.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.seek(0, os.SEEK_END) - COMMENT_BYTES
            file.seek(max(content, 0))
            stored = file.read()
            if content < 0 or not stored.startswith(COMMENT):
                return "no checksum at its end: it was truncated, or not written by this trainer"
            is_right = stored == COMMENT + _sha256(file, content)
    except PermissionError as error:
        raise cannot_read(error) from error
    except OSError as error:
        return error.strerror or str(error)
    return None if is_right else "its checksum does not match"


def stored_checksum(path: str | Path) -> str:
    """The checksum that a whole checkpoint ends with: two files with the same one are equal."""
    with Path(path).open("rb") as file:
        file.seek(-64, os.SEEK_END)
        return file.read().decode()


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint with its checksum; the file appears only when it is whole.

    Raises:
        UserError: If it cannot be written.
    """
    failure = _Failure()
    try:
        with atomic_write(path) as file:
            torch.save(checkpoint, cast(BinaryIO, failure.watch(file)))
            append_checksum(file)
    except torch.AcceleratorError:  # the weights could not be read
        raise
    except RuntimeError as error:  # torch's way to report a failed write
        if failure.error is None:
            raise
        reason = failure.error.strerror or failure.error
        raise UserError(f"{path}: the checkpoint cannot be written ({reason}); free some space") from error


class _Failure:
    """Remembers why a write failed, which torch hides behind a place in its own sources."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def watch(self, file: BinaryIO) -> "_Failure":
        self._file = file
        return self

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        UserError: If it is missing, damaged, may not be read, or holds more than tensors and plain values.
    """
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give a file in it, such as checkpoints/last.ckpt of a run")
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    if problem := verify_checksum(path):
        raise UserError(f"{path}: is damaged ({problem}); resume from another one, --ckpt last finds it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: cannot be read safely: it holds more than tensors and plain values") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is not a checkpoint that can be read ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(METADATA_KEY), dict):
        raise UserError(f"{path}: was not written by this trainer")
    return checkpoint


class Progress(NamedTuple):
    """How far the run of a checkpoint was.

    Attributes:
        step: Its steps; -1 if the file cannot be read.
        saved_at: Time when it was saved, in seconds since 1970.
    """

    step: int
    saved_at: float


def read_progress(path: Path) -> Progress:
    """The steps of a checkpoint, without reading its tensors; whether the file is whole is not checked."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Progress(int(checkpoint["global_step"]), float(checkpoint[METADATA_KEY]["saved_at"]))
    except Exception:  # torch has many ways to say that a file is damaged
        return Progress(-1, 0.0)


def live_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors at the step of the checkpoint, by name."""
    prefix = "model."
    return {
        key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)
    }


def averaged_state(averaging: dict[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights that the weight-averaging callback holds.

    Args:
        averaging: Its state: `method`, `count`, and `weights` by name, for late SWA the sum of the snapshots.

    Returns:
        float32 tensors by name, or None if fewer than two snapshots or steps were averaged.
    """
    if averaging["count"] < 2:
        return None
    divisor = averaging["count"] if averaging["method"] == "late_swa" else 1
    return {name: tensor / divisor for name, tensor in averaging["weights"].items()}


def stored_average(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """The averaged tensors of a checkpoint, or None if it has no average yet."""
    return averaged_state(checkpoint.get("callbacks", {}).get(AVERAGING_KEY, {"count": 0}))
