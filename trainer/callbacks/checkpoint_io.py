"""Checkpoints that are whole or absent, and that load without running anything."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from trainer.checkpoint import load_checkpoint, seal
from trainer.errors import UserError
from trainer.files import atomic_write


class AtomicCheckpointIO(CheckpointIO):
    """Lightning stages in the system's temp folder and moves without a sync; a full disk left a damaged file there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, add the checksum, flush, rename."""
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
                seal(file)
        except torch.AcceleratorError:  # the weights could not be read
            raise
        except RuntimeError as error:  # torch's own word for a failed write
            raise UserError(f"{path}: the checkpoint cannot be written ({error}); free some space") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read tensors and plain values; anything else is refused."""
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint that is no longer wanted."""
        Path(path).unlink(missing_ok=True)
