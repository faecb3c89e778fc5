"""A model from an artifact or a checkpoint, with the tokenizer beside it; without Lightning."""

from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch

from trainer.checkpoint import METADATA_KEY, live_state, load_checkpoint, stored_average
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.files import cannot_read, sha256_of
from trainer.model.config import TransformerConfig
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import Artifact, read_artifact
from trainer.quantize.container import MAGIC
from trainer.quantize.policy import QuantizationConfig
from trainer.run_folder import RunFolder

# What a checkpoint says of its run.
METADATA = ("model", "quantization", "tokenizer_sha256", "shards", "code_sha256", "weights", "precision", "saved_at")


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: Transformer
    tokenizer: sentencepiece.SentencePieceProcessor


def stored_weights(path: Path, weights: str = "live") -> Artifact:
    """Config, tensors and tokenizer sha256 of an artifact or a checkpoint.

    Args:
        path: The file.
        weights: Which weights of a checkpoint: live, averaged, or best, which is averaged if there is an average.

    Raises:
        UserError: If it cannot be read, or holds no average although one is requested.
    """
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; give a file in it, such as artifact.zst or checkpoints/last.ckpt of a run"
        )
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give an artifact or a checkpoint")
    if is_artifact(path, or_checkpoint=True):
        return read_artifact(path)
    checkpoint = load_checkpoint(path)
    metadata = checkpoint[METADATA_KEY]
    state = None if weights == "live" else stored_average(checkpoint)
    if state is None and weights == "averaged":
        raise UserError(f"{path}: holds no average of at least two steps; score it with --weights live")
    try:
        config = TransformerConfig.from_dict(metadata["model"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: was written by another version of this trainer ({error})") from error
    return Artifact(config, state or live_state(checkpoint), metadata.get("tokenizer_sha256"), path)


def load_run(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to resume or to export.

    Raises:
        UserError: If it is an artifact, which has neither an optimizer's state nor full weights, or cannot be read.
    """
    if Path(path).is_file() and is_artifact(Path(path)):
        raise UserError(
            f"{path}: is an artifact, which only holds rounded weights; give a checkpoint, such as "
            "checkpoints/last.ckpt of its run"
        )
    checkpoint = load_checkpoint(path)
    missing = [key for key in METADATA if key not in checkpoint[METADATA_KEY]]
    try:
        TransformerConfig.from_dict(checkpoint[METADATA_KEY].get("model", {}))
        QuantizationConfig(**checkpoint[METADATA_KEY].get("quantization", {}))
    except (KeyError, ValueError, TypeError) as error:
        missing.append(str(error))
    if missing:
        raise UserError(f"{path}: was written by another version of this trainer ({missing[0]})")
    return checkpoint


def is_artifact(path: Path, or_checkpoint: bool = False) -> bool:
    """Whether a file begins as an artifact does.

    Args:
        path: The file.
        or_checkpoint: Whether it must begin as one of the two.

    Raises:
        UserError: If it may not be read, or is neither although it must be.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except PermissionError as error:
        raise cannot_read(error) from error
    if or_checkpoint and start != MAGIC and not start.startswith(b"PK"):  # torch's checkpoints are zip files
        raise UserError(f"{path}: is neither an artifact nor a checkpoint of this trainer; give one of its files")
    return start == MAGIC


def load_artifact(
    path: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Open an artifact, or a checkpoint's averaged (else live) weights.

    Args:
        path: The file.
        tokenizer: SentencePiece model; default: `tokenizer.model` in the run folder.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UserError: If one of the files is missing or damaged, or the tokenizer is not the one of the training.
    """
    path = Path(path)
    stored = stored_weights(path, "best")
    hint = "name another one" if tokenizer else "name it with --tokenizer"
    tokenizer = Path(tokenizer) if tokenizer else RunFolder.containing(path).tokenizer
    processor = load_tokenizer(tokenizer, hint)
    if stored.tokenizer_sha256 not in (None, now := sha256_of(tokenizer)):
        raise UserError(
            f"{tokenizer}: is not the tokenizer this model was trained with (its sha256 begins with {now[:12]}, not "
            f"{stored.tokenizer_sha256[:12]}); {hint}"
        )
    return LoadedModel(stored.build().to(device).eval(), processor)
