"""From weights to the file that counts: prune, quantise, compress, and hold the sum against the cap."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.model.transformer import TransformerConfig
from trainer.quantize.artifact import write_artifact
from trainer.quantize.intn import prune_smallest
from trainer.quantize.policy import QuantizationConfig, kind_of
from trainer.submission.bundle import source_bundle

CAP = 16_000_000  # decimal, code and model together


@dataclass(frozen=True)
class ExportedSize:
    """Bytes of the files that ship."""

    model: int
    code: int

    @property
    def total(self) -> int:
        """Code and model together."""
        return self.model + self.code


def export(
    state: dict[str, Tensor],
    model: TransformerConfig,
    quantization: QuantizationConfig,
    tokenizer_sha256: str,
    folder: Path,
    cap: int = CAP,
) -> ExportedSize:
    """Write `artifact.zst` and `train_gpt.py` (this project's sources) into a folder.

    Args:
        state: The model's tensors, live or averaged.
        model: Its sizes.
        quantization: Stored types and pruning.
        tokenizer_sha256: Fingerprint of the tokenizer.
        folder: Where the two files go.
        cap: Largest sum of their sizes.

    Raises:
        UserError: If they are larger; both files stay for inspection.
    """
    pruned = {
        name: prune_smallest(tensor, quantization.prune_frac)
        if tensor.ndim == 2 and tensor.numel() > quantization.prune_above
        else tensor
        for name, tensor in state.items()
    }
    kinds = {name: kind_of(name, tensor, model, quantization) for name, tensor in state.items()}
    model_bytes = write_artifact(folder / "artifact.zst", model, pruned, kinds, tokenizer_sha256)
    code = source_bundle()
    with atomic_write(folder / "train_gpt.py") as file:
        file.write(code)
    size = ExportedSize(model_bytes, len(code))
    if size.total > cap:
        raise UserError(
            f"{folder / 'artifact.zst'}: {model_bytes:,} bytes of model and {len(code):,} of code are "
            f"{size.total - cap:,} bytes over the cap of {cap:,}; store fewer bits (--export.quantization.mlp_bits) or "
            "train a smaller model"
        )
    return size
