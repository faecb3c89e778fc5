"""From weights to the file that counts: prune, quantise, compress, and hold the sum against the cap."""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.model.transformer import TransformerConfig
from trainer.quantize.artifact import write_artifact
from trainer.quantize.intn import prune_smallest
from trainer.quantize.policy import QuantizationConfig, kind_of, tighter
from trainer.submission.bundle import source_bundle

CAP = 16_000_000  # decimal, code and model together


@dataclass(frozen=True)
class ExportedSize:
    """Bytes of the files that ship.

    Attributes:
        model: Of the artifact.
        code: Of the sources.
        quantization: How it was stored.
    """

    model: int
    code: int
    quantization: QuantizationConfig

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
    fit: bool = False,
) -> ExportedSize:
    """Write `artifact.zst` and `train_gpt.py` (this project's sources) into a folder.

    Args:
        state: The model's tensors, live or averaged.
        model: Its sizes.
        quantization: Stored types and pruning.
        tokenizer_sha256: Fingerprint of the tokenizer.
        folder: Where the two files go.
        cap: Largest sum of their sizes.
        fit: Store less until they fit.

    Raises:
        UserError: If they are larger and may not store less, or cannot; both files stay for inspection.
    """
    code = source_bundle()
    with atomic_write(folder / "train_gpt.py") as file:
        file.write(code)
    path = folder / "artifact.zst"
    asked = ExportedSize(_write(path, state, model, quantization, tokenizer_sha256), len(code), quantization)
    if asked.total <= cap:
        return asked
    over = (
        f"{path}: {asked.model:,} bytes of model and {asked.code:,} of code are {asked.total - cap:,} bytes over "
        f"the cap of {cap:,}"
    )
    trial = path if fit else folder / ".trial.zst"
    try:
        for choice in tighter(quantization):
            size = ExportedSize(_write(trial, state, model, choice, tokenizer_sha256), len(code), choice)
            if size.total <= cap and fit:
                print(f"{over}; stored with {_changes(quantization, choice)} instead: {size.total:,} bytes", flush=True)
                return size
            if size.total <= cap:
                raise UserError(
                    f"{over}; {_changes(quantization, choice)} would fit ({size.total:,} bytes): "
                    "trainer export --fit --ckpt with the run's last.ckpt does that, --export.fit true for a whole run"
                )
    finally:
        if not fit:
            trial.unlink(missing_ok=True)
    raise UserError(f"{over}, and {size.total - cap:,} with {_changes(quantization, choice)}; train a smaller model")


def _write(
    path: Path,
    state: dict[str, Tensor],
    model: TransformerConfig,
    quantization: QuantizationConfig,
    tokenizer_sha256: str,
) -> int:
    pruned = {
        name: prune_smallest(tensor, quantization.prune_frac)
        if tensor.ndim == 2 and tensor.numel() > quantization.prune_above
        else tensor
        for name, tensor in state.items()
    }
    kinds = {name: kind_of(name, tensor, model, quantization) for name, tensor in state.items()}
    return write_artifact(path, model, pruned, kinds, tokenizer_sha256)


def _changes(before: QuantizationConfig, after: QuantizationConfig) -> str:
    pairs = zip(asdict(before).items(), asdict(after).values(), strict=True)
    return ", ".join(f"{name} {new}" for (name, old), new in pairs if new != old)
