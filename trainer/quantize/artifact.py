"""A compressed model: from torch's tensors into the container and back."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model.transformer import Transformer, TransformerConfig
from trainer.quantize.container import INTEGERS, Codec, StoredTensor, read_container, write_container
from trainer.quantize.intn import quantize_rows


@dataclass(frozen=True)
class Artifact:
    """A model read back from its file.

    Attributes:
        model: Its sizes.
        state: float32 tensors by name.
        tokenizer_sha256: Fingerprint of the tokenizer it was trained with; None in a checkpoint without one.
    """

    model: TransformerConfig
    state: dict[str, Tensor]
    tokenizer_sha256: str | None

    def build(self) -> Transformer:
        """The model with these weights.

        Raises:
            UserError: If the tensors are not those of the model.
        """
        try:
            if self.model.num_layers > len(self.state):
                raise ValueError(f"{self.model.num_layers} layers, but {len(self.state)} tensors")
            with torch.device("meta"):  # sizes that no tensor has take no memory
                model = Transformer(self.model)
            model.load_state_dict(self.state, assign=True)
        except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            raise UserError(f"artifact: its tensors do not fit its model ({error})") from error
        return model


def write_artifact(
    path: str | Path,
    model: TransformerConfig,
    state: dict[str, Tensor],
    kinds: dict[str, str],
    tokenizer_sha256: str,
    rounded: dict[str, StoredTensor] | None = None,
    codec: Codec = "zstd-22",
) -> int:
    """Quantise a state and write it.

    Args:
        path: The file.
        model: Sizes of the model.
        state: Its tensors.
        kinds: Stored type of each that is not in `rounded`.
        tokenizer_sha256: Fingerprint of the tokenizer.
        rounded: Tensors that are quantised already.
        codec: See QuantizationConfig.

    Returns:
        Bytes of the file.
    """
    rounded = rounded or {}
    stored = {
        name: rounded[name] if name in rounded else _store(tensor.detach().cpu(), kinds[name])
        for name, tensor in state.items()
    }
    return write_container(path, {"model": model.to_dict(), "tokenizer_sha256": tokenizer_sha256}, stored, codec)


def read_artifact(path: str | Path) -> Artifact:
    """Read and check a file of `write_artifact`.

    Raises:
        UserError: If it is damaged, unknown or not what its header says.
    """
    header, stored = read_container(path)
    try:
        model, fingerprint = TransformerConfig.from_dict(header["model"]), header["tokenizer_sha256"]
        if not isinstance(fingerprint, str):
            raise ValueError("its tokenizer fingerprint is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a valid artifact ({error})") from error
    return Artifact(model, {name: torch.from_numpy(tensor.floats()) for name, tensor in stored.items()}, fingerprint)


def _store(tensor: Tensor, kind: str) -> StoredTensor:
    if kind in INTEGERS:
        symbols, scale = quantize_rows(tensor, INTEGERS[kind])
        return StoredTensor(kind, symbols.numpy(), scale.numpy())
    return StoredTensor(kind, tensor.float().numpy())
