"""Reading a checkpoint without running anything from it, and the weights it holds."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError

OWN_KEY = "golf_trainer"  # plain values that let `export` and `validate` use the file alone


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        UserError: If it is missing, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is not a checkpoint that can be read safely ({reason})") from error
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
    return averaged_state(checkpoint["callbacks"].get("LateSWA", {"sum": {}, "count": 0}))
