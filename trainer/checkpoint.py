"""Reading a checkpoint without running anything from it, and the weights it holds.

A checkpoint is torch's own zip file; its archive comment is the sha256 of all bytes before it, so that other tools can
still load it.
"""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.errors import UserError

OWN_KEY = "golf_trainer"  # plain values that let `export` and `validate` use the file alone

SEAL = b"sha256:"
SEAL_BYTES = len(SEAL) + 64
ZIP_END = b"PK\x05\x06"  # of 22 bytes with no comment; the last two are the comment's length


def seal(file: BinaryIO) -> None:
    """Give a zip file that ends at the file's end the checksum as its comment."""
    file.seek(-22, 2)
    if file.read(4) != ZIP_END:
        raise RuntimeError("torch.save wrote no plain zip file")
    file.seek(-2, 2)
    file.write(struct.pack("<H", SEAL_BYTES))
    digest = _sha256(file, file.seek(0, 2))
    file.write(SEAL + digest)


def _sha256(file: BinaryIO, count: int) -> bytes:
    """Hexadecimal sha256 of the first bytes of a file; the position is then behind them."""
    file.seek(0)
    sha = hashlib.sha256()
    while count:
        piece = file.read(min(count, 2**20))
        sha.update(piece)
        count -= len(piece)
    return sha.hexdigest().encode()


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint's bytes, or None if its checksum is right."""
    try:
        with Path(path).open("rb") as file:
            left = file.seek(0, 2) - SEAL_BYTES
            file.seek(max(left, 0))
            stored = file.read()
            if left < 0 or not stored.startswith(SEAL):
                return "no checksum at its end: it was cut, or not written by this trainer"
            right = stored == SEAL + _sha256(file, left)
    except OSError as error:
        return error.strerror or str(error)
    return None if right else "its checksum does not match"


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        UserError: If it is missing, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    if found := damage(path):
        raise UserError(f"{path}: is damaged ({found}); go on from another one, --ckpt last finds it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: cannot be read safely: it holds more than tensors and plain values") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is not a checkpoint that can be read ({reason})") from error
    if not isinstance(checkpoint, dict) or OWN_KEY not in checkpoint:
        raise UserError(f"{path}: was not written by this trainer")
    return checkpoint


def live_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors at the step of the checkpoint."""
    prefix = "model."
    return {
        key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)
    }


def averaged_state(swa: dict[str, Any]) -> dict[str, Tensor] | None:
    """Mean of late SWA's snapshots.

    Args:
        swa: Its `sum` by name and its `count`, as in `checkpoint["callbacks"]["LateSWA"]`.

    Returns:
        float32 tensors by name, or None if there are fewer than two snapshots.
    """
    if swa["count"] < 2:
        return None
    return {name: tensor / swa["count"] for name, tensor in swa["sum"].items()}


def stored_average(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """The averaged tensors of a checkpoint, or None if there is no average yet."""
    ema = checkpoint["callbacks"].get("EMA", {"mean": {}, "count": 0})
    if ema["count"] > 1:
        return dict(ema["mean"])
    return averaged_state(checkpoint["callbacks"].get("LateSWA", {"sum": {}, "count": 0}))
