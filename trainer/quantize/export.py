"""From weights to the file that counts: prune, quantise, compress, and hold the sum against the cap."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.model.transformer import TransformerConfig
from trainer.quantize.artifact import write_artifact
from trainer.quantize.intn import prune_smallest
from trainer.quantize.policy import QuantizationConfig, kind_of, tighter
from trainer.quantize.sensitive import SensitiveRounding
from trainer.submission.bundle import source_bundle

CAP = 16_000_000  # decimal, code and model together
FIT_WITHIN = 20_000  # bytes that a fitted file may leave unused
FINEST, COARSEST = 2e-5, 1e-1  # steps; with the first, all of 30 million weights raise the loss by 0.0005 nats
MOST_TRIES = 12


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
    rounding: SensitiveRounding | None = None,
    say: Callable[[str], None] = print,
) -> ExportedSize:
    """Write `artifact.zst` and `train_gpt.py` (this project's sources) into a folder.

    Args:
        state: The model's tensors, live or averaged.
        model: Its sizes.
        quantization: Stored types and pruning.
        tokenizer_sha256: Fingerprint of the tokenizer.
        folder: Where the two files go.
        cap: Largest sum of their sizes.
        fit: Store less until they fit; with `rounding`, find the step that just fits, also a finer one.
        rounding: The matrices, prepared, if the quantization is `sensitive`.
        say: Where a line goes about what was stored instead, or tried.

    Raises:
        UserError: If they are larger and may not store less, or cannot; both files stay for inspection.
    """
    if (rounding is None) != (quantization.rounding == "nearest"):
        raise RuntimeError("sensitive rounding needs its moments, nearest rounding has none")
    code = source_bundle()
    with atomic_write(folder / "train_gpt.py") as file:
        file.write(code)
    path = folder / "artifact.zst"

    def write(choice: QuantizationConfig, to: Path = path) -> ExportedSize:
        return ExportedSize(_write(to, state, model, choice, tokenizer_sha256, rounding), len(code), choice)

    if rounding is not None and fit:
        parameters = sum(tensor.numel() for tensor in state.values())
        return fit_step(write, quantization, cap, parameters, say)
    asked = write(quantization)
    if asked.total <= cap:
        return asked
    over = (
        f"{path}: {asked.model:,} bytes of model and {asked.code:,} of code are {asked.total - cap:,} bytes over "
        f"the cap of {cap:,}"
    )
    if rounding is not None:
        raise UserError(f"{over}; --export.fit true finds the step that fits")
    trial = path if fit else folder / ".trial.zst"
    try:
        for choice in tighter(quantization):
            size = write(choice, trial)
            if size.total <= cap and fit:
                say(f"{over}; stored with {_changes(quantization, choice)} instead: {size.total:,} bytes")
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


def fit_step(
    write: Callable[[QuantizationConfig], ExportedSize],
    quantization: QuantizationConfig,
    cap: int,
    parameters: int,
    say: Callable[[str], None] = print,
) -> ExportedSize:
    """Search for the finest step whose file fits; the file of the last call of `write` is that of the result.

    Each halving of the step takes about a bit more of every parameter, so a line through the last two sizes over the
    step's logarithm leads there in a few steps.

    Args:
        write: Writes a choice and tells its size.
        quantization: Where the search begins.
        cap: Largest total.
        parameters: Numbers of the model, for the first slope.
        say: Told what each step cost.

    Raises:
        UserError: If even the coarsest step does not fit.
    """
    tried: dict[float, ExportedSize] = {}  # by log2 of the step
    place = math.log2(quantization.step)
    slope = -parameters / 8
    for _ in range(MOST_TRIES):
        started = time.monotonic()
        tried[place] = size = write(replace(quantization, step=2**place))
        say(f"step {2**place:.3e}: {size.total:,} bytes ({time.monotonic() - started:.1f} s)")
        if cap - FIT_WITHIN <= size.total <= cap or (size.total <= cap and 2**place <= FINEST):
            return size
        if size.total > cap and 2**place >= COARSEST:
            raise UserError(
                f"{size.total - cap:,} bytes over the cap even with step {2**place:.1e}; train a smaller model"
            )
        larger = max((at for at, found in tried.items() if found.total > cap), default=None)
        smaller = min((at for at, found in tried.items() if found.total <= cap), default=None)
        nearest, *others = sorted(tried, key=lambda at: abs(tried[at].total - cap))
        if others and tried[others[0]].total != tried[nearest].total:
            slope = (tried[others[0]].total - tried[nearest].total) / (others[0] - nearest)
        place = nearest + (cap - FIT_WITHIN / 2 - tried[nearest].total) / slope
        if larger is not None and smaller is not None and not larger < place < smaller:
            place = (larger + smaller) / 2
        place = min(max(place, math.log2(FINEST)), math.log2(COARSEST))
    fitting = [found for found in tried.values() if found.total <= cap]
    if not fitting:
        raise UserError(f"no step was found that fits into {cap:,} bytes")
    return write(max(fitting, key=lambda found: found.total).quantization)


def _write(
    path: Path,
    state: dict[str, Tensor],
    model: TransformerConfig,
    quantization: QuantizationConfig,
    tokenizer_sha256: str,
    rounding: SensitiveRounding | None,
) -> int:
    pruned = {
        name: prune_smallest(tensor, quantization.prune_frac)
        if tensor.ndim == 2 and tensor.numel() > quantization.prune_above
        else tensor
        for name, tensor in state.items()
    }
    kinds = {name: kind_of(name, tensor, model, quantization) for name, tensor in state.items()}
    rounded = rounding.round(quantization.step) if rounding else None
    return write_artifact(path, model, pruned, kinds, tokenizer_sha256, rounded, quantization.codec)


def _changes(before: QuantizationConfig, after: QuantizationConfig) -> str:
    pairs = zip(asdict(before).items(), asdict(after).values(), strict=True)
    return ", ".join(f"{name} {new}" for (name, old), new in pairs if new != old)
