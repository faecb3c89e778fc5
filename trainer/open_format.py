"""A model in files that other programs open: safetensors, a JSON config and the tokenizer."""

import json
from pathlib import Path
from typing import Literal

import torch

from trainer.errors import UserError
from trainer.files import atomic_write, copy_file
from trainer.quantize.artifact import Artifact

Dtype = Literal["float32", "bfloat16"]
MODEL, CONFIG = "model.safetensors", "config.json"


def write_open_format(weights: Artifact, tokenizer: Path, folder: Path, dtype: Dtype = "float32") -> int:
    """Write the tensors as numbers, without any compression.

    Args:
        weights: What an artifact or a checkpoint holds.
        tokenizer: Its SentencePiece model.
        folder: Where `model.safetensors`, `config.json` and `tokenizer.model` go; must not exist, or be empty.
        dtype: Type of the tensors.

    Returns:
        Bytes of `model.safetensors`.

    Raises:
        UserError: If the package safetensors is missing, or the folder cannot be used.
    """
    try:
        from safetensors.torch import save  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError("--format safetensors needs the package safetensors; pip install safetensors") from error
    weights.build()  # refuses tensors that are not those of the model
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: is missing; the model is of no use without it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--out {folder}: holds other files; choose another --out or remove it")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); choose another --out") from error
    copy_file(tokenizer, folder / tokenizer.name, weights.tokenizer_sha256)  # first: it may be another one
    tensors = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.state.items()}
    data = save(tensors, {"format": "pt"})
    config = {**weights.model.to_dict(), "tokenizer_sha256": weights.tokenizer_sha256, "dtype": dtype}
    for name, content in ((MODEL, data), (CONFIG, (json.dumps(config, indent=2) + "\n").encode())):
        with atomic_write(folder / name) as file:
            file.write(content)
    return len(data)
