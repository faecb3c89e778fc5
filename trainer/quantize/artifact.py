"""A compressed model: from torch's tensors to the file and back."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model.config import TransformerConfig
from trainer.model.transformer import Transformer
from trainer.quantize.container import INTEGERS, Codec, StoredTensor, read_container, write_container
from trainer.quantize.rounding import quantize_rows


@dataclass(frozen=True)
class Artifact:
    """A model read back from its file.

    Attributes:
        model: Config of the model.
        state: float32 tensors by name.
        tokenizer_sha256: sha256 of the tokenizer it was trained with; None in a checkpoint without one.
        path: The file, for errors.
    """

    model: TransformerConfig
    state: dict[str, Tensor]
    tokenizer_sha256: str | None
    path: str | Path

    def build(self) -> Transformer:
        """The model with these weights.

        Raises:
            UserError: If the tensors are not those of the model.
        """
        try:
            if self.model.num_layers > len(self.state):
                raise ValueError(f"{self.model.num_layers} layers, but {len(self.state)} tensors")
            with torch.device("meta"):  # sizes that the file only claims take no memory
                model = Transformer(self.model)
            needed = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
            for name in sorted({*needed, *self.state}):
                if name not in needed or name not in self.state:
                    raise ValueError(f"it {'lacks' if name in needed else 'has no use for'} the tensor {name!r}")
                if (shape := list(self.state[name].shape)) != needed[name]:
                    raise ValueError(f"the tensor {name!r} has the shape {shape}, the model needs {needed[name]}")
            model.load_state_dict(self.state, assign=True)
        except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            raise UserError(
                f"{self.path}: its tensors do not fit its model ({error}); if code of your own has changed the model, "
                "run this command with it"
            ) from error
        return model


def write_artifact(
    path: str | Path,
    model: TransformerConfig,
    state: dict[str, Tensor],
    storage_dtypes: dict[str, str],
    tokenizer_sha256: str,
    rounded: dict[str, StoredTensor] | None = None,
    codec: Codec = "zstd-22",
) -> int:
    """Quantize a state and write it.

    Args:
        path: The file.
        model: Config of the model.
        state: Tensors of the model.
        storage_dtypes: Storage type of each tensor that is not in `rounded`.
        tokenizer_sha256: sha256 of the tokenizer.
        rounded: Tensors that are quantized already.
        codec: Entropy coder, as in QuantizationConfig.

    Returns:
        Bytes of the file.
    """
    rounded = rounded or {}
    stored = {
        name: rounded[name] if name in rounded else to_stored(tensor.detach().cpu(), storage_dtypes[name])
        for name, tensor in state.items()
    }
    return write_container(path, {"model": model.to_dict(), "tokenizer_sha256": tokenizer_sha256}, stored, codec)


def read_artifact(path: str | Path, content: bytes | None = None) -> Artifact:
    """Read and check a file of `write_artifact`.

    Args:
        path: The file.
        content: Its bytes, if they were read already.

    Raises:
        UserError: If it is damaged, of an unknown version, or contradicts its header.
    """
    header, stored = read_container(path, content)
    try:
        for key, kind in (("model", dict), ("tokenizer_sha256", str)):
            if not isinstance(header.get(key), kind):
                raise ValueError(f"its header lacks {key}, or it is invalid")
        model = TransformerConfig.from_dict(header["model"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a valid artifact ({error})") from error
    state = {name: torch.from_numpy(tensor.floats()) for name, tensor in stored.items()}
    return Artifact(model, state, header["tokenizer_sha256"], path)


def to_stored(tensor: Tensor, dtype: str) -> StoredTensor:
    """Round a tensor on the CPU to its storage type."""
    if dtype in INTEGERS:
        symbols, scale = quantize_rows(tensor, INTEGERS[dtype])
        return StoredTensor(dtype, symbols.numpy(), scale.numpy())
    return StoredTensor(dtype, tensor.float().numpy())
