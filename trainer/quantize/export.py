"""From weights to the file that counts: calibrate, round, write, hold the size against the cap, read back, score."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from trainer.distributed import bytes_of_first_rank, on_first_rank
from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.logging import logger
from trainer.model.config import TransformerConfig
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import read_artifact, write_artifact
from trainer.quantize.calibration import calibrate
from trainer.quantize.loss_aware import LossAwareRounding
from trainer.quantize.policy import QuantizationConfig, smaller_configs, storage_dtype
from trainer.quantize.rounding import prune_smallest
from trainer.run_folder import RunFolder

SIZE_CAP = 16_000_000  # decimal bytes, code and model together
CAP_TOLERANCE = 20_000  # bytes that the search for a step may leave unused
FINEST, COARSEST = 2e-5, 1e-1  # steps; the first raises the loss of 30 million weights by 0.0005 nats altogether
MAX_TRIES = 12


@dataclass(frozen=True)
class ExportedSize:
    """Bytes of the files that ship.

    Attributes:
        model: Bytes of the artifact.
        code: Bytes of the sources.
        quantization: How the weights were stored.
    """

    model: int
    code: int
    quantization: QuantizationConfig

    @property
    def total(self) -> int:
        """Bytes of code and model together."""
        return self.model + self.code


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        size: Bytes of the files.
        calibration_seconds: Time of the calibration, which the challenge counts as training.
        export_seconds: Time of rounding and writing.
    """

    size: ExportedSize
    calibration_seconds: float
    export_seconds: float


def export(
    model: Transformer,
    quantization: QuantizationConfig,
    tokenizer_sha256: str,
    folder: Path,
    code: bytes,
    cap: int = SIZE_CAP,
    shrink_to_cap: bool = False,
    sequences: Iterable[Tensor] = (),
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    score: Callable[[Transformer], object] | None = None,
) -> Exported | None:
    """Write `artifact.zst` and `train_gpt.py` on rank 0, then read the artifact back and score it on all processes.

    Args:
        model: The weights to store, live or averaged, on the device to compute on.
        quantization: Storage types, rounding and pruning.
        tokenizer_sha256: sha256 of the tokenizer.
        folder: Where the two files go.
        code: Content of `train_gpt.py`.
        cap: Largest sum of their sizes, in bytes.
        shrink_to_cap: Store less until they fit; with loss-aware rounding, search for the finest step that fits.
        sequences: (B, T + 1) training tokens each, on the model's device, for loss-aware rounding.
        autocast: Context that the model runs in while it is calibrated.
        score: Called with the model that was read back.

    Returns:
        Sizes and times on rank 0, None on the other processes.

    Raises:
        UserError: If the files exceed the cap and may not shrink, or cannot; both stay for inspection.
    """

    def write() -> Exported:
        started = time.monotonic()
        calibration_seconds, rounding = 0.0, None
        if quantization.rounding == "loss_aware":
            with autocast():
                moments = calibrate(model, sequences)
            calibration_seconds = time.monotonic() - started
            rounding = LossAwareRounding(model.state_dict(), moments)
        size = store(
            model.state_dict(), model.config, quantization, tokenizer_sha256, folder, code, cap, shrink_to_cap, rounding
        )
        return Exported(size, calibration_seconds, time.monotonic() - started - calibration_seconds)

    like = model.skip_weights
    exported = on_first_rank(write, like.device)
    path = RunFolder(folder).artifact
    content = bytes_of_first_rank(path.read_bytes, like.device)  # on another node, the folder may be another one
    stored = read_artifact(path, content).build().to(device=like.device, dtype=like.dtype)
    if score is not None:
        score(stored)
    return exported


def store(
    state: dict[str, Tensor],
    model: TransformerConfig,
    quantization: QuantizationConfig,
    tokenizer_sha256: str,
    folder: Path,
    code: bytes,
    cap: int = SIZE_CAP,
    shrink_to_cap: bool = False,
    rounding: LossAwareRounding | None = None,
) -> ExportedSize:
    """Round and write a state; the arguments are those of `export`.

    Args:
        state: The model's tensors.
        model: Config of the model.
        quantization: Storage types, rounding and pruning.
        tokenizer_sha256: sha256 of the tokenizer.
        folder: Where the files go.
        code: Content of `train_gpt.py`.
        cap: Largest sum of the sizes, in bytes.
        shrink_to_cap: Store less until they fit.
        rounding: The prepared matrices, for loss-aware rounding.

    Raises:
        UserError: If the files exceed the cap and may not shrink, or cannot.
    """
    run = RunFolder(folder)
    with atomic_write(run.code) as file:
        file.write(code)
    path = run.artifact

    def write(choice: QuantizationConfig, to: Path = path) -> ExportedSize:
        return ExportedSize(_write(to, state, model, choice, tokenizer_sha256, rounding), len(code), choice)

    if rounding is not None and shrink_to_cap:
        parameters = sum(tensor.numel() for tensor in state.values())
        return find_quant_step(write, quantization, cap, parameters)
    requested = write(quantization)
    if requested.total <= cap:
        return requested
    problem = (
        f"{path}: {requested.model:,} bytes of model and {requested.code:,} of code are {requested.total - cap:,} "
        f"bytes over the cap of {cap:,}"
    )
    if rounding is not None:
        raise UserError(f"{problem}; --export.shrink_to_cap true searches for the step that fits")
    trial = path if shrink_to_cap else folder / ".trial.zst"
    try:
        for choice in smaller_configs(quantization):
            size = write(choice, trial)
            if size.total <= cap and shrink_to_cap:
                logger.info(f"{problem}; stored with {_changes(quantization, choice)} instead: {size.total:,} bytes")
                return size
            if size.total <= cap:
                raise UserError(
                    f"{problem}; {_changes(quantization, choice)} would fit ({size.total:,} bytes): run trainer export "
                    "--shrink_to_cap --ckpt with the run's last.ckpt, or the whole run with --export.shrink_to_cap true"
                )
    finally:
        if not shrink_to_cap:
            trial.unlink(missing_ok=True)
    raise UserError(f"{problem}, and {size.total - cap:,} with {_changes(quantization, choice)}; train a smaller model")


def find_quant_step(
    write: Callable[[QuantizationConfig], ExportedSize], quantization: QuantizationConfig, cap: int, parameters: int
) -> ExportedSize:
    """Search for the finest step whose files fit; the last call of `write` makes those of the result.

    Each halving of the step takes about one more bit per parameter, so a line through the last two sizes over the
    logarithm of the step leads there in a few tries.

    Args:
        write: Writes the files of a config and returns their size.
        quantization: Where the search starts.
        cap: Largest total, in bytes.
        parameters: Number of the model's parameters, for the first slope.

    Raises:
        UserError: If even the coarsest step does not fit.
    """
    sizes: dict[float, ExportedSize] = {}  # by log2 of the step
    log_step = math.log2(quantization.quant_step)
    slope = -parameters / 8
    for _ in range(MAX_TRIES):
        started = time.monotonic()
        sizes[log_step] = size = write(replace(quantization, quant_step=2**log_step))
        logger.info(f"quant_step {2**log_step:.3e}: {size.total:,} bytes ({time.monotonic() - started:.1f} s)")
        if cap - CAP_TOLERANCE <= size.total <= cap or (size.total <= cap and 2**log_step <= FINEST):
            return size
        if size.total > cap and 2**log_step >= COARSEST:
            raise UserError(
                f"{size.total - cap:,} bytes over the cap even with quant_step {2**log_step:.1e}; train a smaller model"
            )
        too_large = max((at for at, size in sizes.items() if size.total > cap), default=None)
        fitting = min((at for at, size in sizes.items() if size.total <= cap), default=None)
        nearest, *others = sorted(sizes, key=lambda at: abs(sizes[at].total - cap))
        if others and sizes[others[0]].total != sizes[nearest].total:
            slope = (sizes[others[0]].total - sizes[nearest].total) / (others[0] - nearest)
        log_step = nearest + (cap - CAP_TOLERANCE / 2 - sizes[nearest].total) / slope
        if too_large is not None and fitting is not None and not too_large < log_step < fitting:
            log_step = (too_large + fitting) / 2
        log_step = min(max(log_step, math.log2(FINEST)), math.log2(COARSEST))
    best = max((size for size in sizes.values() if size.total <= cap), key=lambda size: size.total, default=None)
    if best is None:
        raise UserError(f"no quant_step fits into {cap:,} bytes after {MAX_TRIES} tries; train a smaller model")
    return write(best.quantization)


def _write(
    path: Path,
    state: dict[str, Tensor],
    model: TransformerConfig,
    quantization: QuantizationConfig,
    tokenizer_sha256: str,
    rounding: LossAwareRounding | None,
) -> int:
    pruned = {
        name: prune_smallest(tensor, quantization.prune_frac)
        if tensor.ndim == 2 and tensor.numel() > quantization.prune_above
        else tensor
        for name, tensor in state.items()
    }
    dtypes = {name: storage_dtype(name, tensor, model, quantization) for name, tensor in state.items()}
    rounded = rounding.round(quantization.quant_step) if rounding else None
    return write_artifact(path, model, pruned, dtypes, tokenizer_sha256, rounded, quantization.codec)


def _changes(before: QuantizationConfig, after: QuantizationConfig) -> str:
    pairs = zip(asdict(before).items(), asdict(after).values(), strict=True)
    return ", ".join(f"{name} {new}" for (name, old), new in pairs if new != old)
