"""A model for use: from an artifact or a checkpoint, with the tokenizer that lies beside it; without Lightning."""

from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

from trainer.checkpoint import OWN_KEY, live_state, load_checkpoint, stored_average
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.model.transformer import Transformer, TransformerConfig
from trainer.quantize.artifact import Artifact, read_artifact
from trainer.quantize.container import MAGIC


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: Transformer
    tokenizer: sentencepiece.SentencePieceProcessor


def stored_weights(path: Path, weights: str = "live") -> Artifact:
    """Model, tensors and tokenizer fingerprint of an artifact or a checkpoint.

    Args:
        path: The file.
        weights: Of a checkpoint: live, averaged, or best, which is averaged if there is an average.

    Raises:
        UserError: If it cannot be read, or holds no average although one is wanted.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give an artifact or a checkpoint")
    with path.open("rb") as file:
        is_artifact = file.read(len(MAGIC)) == MAGIC
    if is_artifact:
        return read_artifact(path)
    checkpoint = load_checkpoint(path)
    own = checkpoint[OWN_KEY]
    state = None if weights == "live" else stored_average(checkpoint)
    if state is None and weights == "averaged":
        raise UserError(f"{path}: holds fewer than two snapshots, so no average; score it with --weights live")
    return Artifact(
        TransformerConfig.from_dict(own["model"]), state or live_state(checkpoint), own.get("tokenizer_sha256")
    )


def run_folder_of(path: Path) -> Path:
    """The run folder that a checkpoint or an artifact lies in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def load_artifact(
    path: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Open an artifact, or a checkpoint's averaged (else live) weights.

    Args:
        path: The file.
        tokenizer: SentencePiece model; default: `tokenizer.model` in the run folder.
        device: Where the model goes.

    Raises:
        UserError: If one of the files is missing or damaged, or the tokenizer is another one than in training.
    """
    path = Path(path)
    stored = stored_weights(path, "best")
    place = Path(tokenizer) if tokenizer else run_folder_of(path) / "tokenizer.model"
    processor = load_tokenizer(place)
    if stored.tokenizer_sha256 not in (None, sha256_of(place)):
        raise UserError(f"{place}: is not the tokenizer this model was trained with; name it with --tokenizer")
    return LoadedModel(stored.build().to(device).eval(), processor)
