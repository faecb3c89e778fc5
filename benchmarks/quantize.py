"""The cost of rounding and the sizes of codecs: several ways to store the same trained weights.

`python -m benchmarks.quantize runs/frontier/1/checkpoints/last.ckpt --data data/sp8192` prints the rise of the loss at
equal sizes, and the bytes of each codec. The loss is that of plain windows of the first validation targets.
"""

import argparse
import json
import lzma
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import brotli
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.subject import report
from trainer.data.sources import Shards
from trainer.datamodule import TokenData
from trainer.errors import UserError
from trainer.evaluation.sliding import score
from trainer.evaluation.windows import EvaluationConfig
from trainer.loading import stored_weights
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import read_artifact, write_artifact
from trainer.quantize.calibration import EMBEDDING, Moments, calibrate
from trainer.quantize.container import StoredTensor, compress
from trainer.quantize.entropy_coding import classes_of
from trainer.quantize.entropy_coding import encode as entropy_code
from trainer.quantize.gptq import inverse_factor, round_with_feedback
from trainer.quantize.loss_aware import LossAwareRounding
from trainer.quantize.policy import QuantizationConfig, storage_dtype

Round = Callable[[float], dict[str, StoredTensor]]


def row_deviations(state: dict[str, Tensor], moments: dict[str, Moments], finer_embedding: float) -> Round:
    """GPTQ with steps in proportion to a row's standard deviation (SDClip, openai/parameter-golf #1394)."""
    factors = {name: inverse_factor(moment.hessian) for name, moment in moments.items()}

    def rounded(step: float) -> dict[str, StoredTensor]:
        stored = {}
        for name, (order, factor) in factors.items():
            weight = state[name].float()
            scale = step * weight.std(1) / (finer_embedding if name == EMBEDDING else 1)
            scale = torch.maximum(scale, weight.abs().amax(1) / 127).half()
            symbols = round_with_feedback(weight, scale.float()[:, None].expand_as(weight), 127, order, factor)
            stored[name] = StoredTensor("int8", symbols.cpu().numpy(), scale.cpu().numpy())
        return stored

    return rounded


def at_size(rounded: Round, size_of: Callable[[dict[str, StoredTensor]], int], target: int, start: float) -> float:
    """The step whose file has this size, to about 0.1 %."""
    low, high = np.log(start) - 6, np.log(start) + 6
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if size_of(rounded(float(np.exp(middle)))) > target else (low, middle)
    return float(np.exp((low + high) / 2))


def order_0_bits(matrices: Iterable[np.ndarray]) -> float:
    """Bits of an ideal coder that knows how often each symbol occurs in its matrix."""
    total = 0.0
    for matrix in matrices:
        counts = np.unique(matrix, return_counts=True)[1]
        total -= float((counts * np.log2(counts / matrix.size)).sum())
    return total


def codecs(tensors: dict[str, StoredTensor]) -> list[dict[str, object]]:
    """Bytes and seconds of each codec on the symbols, and how they compare with order-0 entropy."""
    symbols = [tensor.values.reshape(len(tensor.scale), -1) for tensor in tensors.values() if tensor.scale is not None]
    stream = b"".join(matrix.tobytes() for matrix in symbols)
    bound = order_0_bits(symbols) / 8

    def entropy() -> int:
        classes = [classes_of(matrix) for matrix in symbols]
        tables, words = entropy_code(symbols, classes)
        side = tables.tobytes() + b"".join(each.tobytes() for pair in classes for each in pair)
        return words.nbytes + len(compress(side))

    rows: list[dict[str, object]] = []
    for name, measure in {
        "zstd-22": lambda: len(compress(stream)),
        "brotli-11": lambda: len(brotli.compress(stream, quality=11, lgwin=24)),
        "lzma-9e": lambda: len(lzma.compress(stream, preset=9 | lzma.PRESET_EXTREME)),
        "ans with classes": entropy,
    }.items():
        started = time.perf_counter()
        size = measure()
        seconds = time.perf_counter() - started
        rows.append({"codec": name, "bytes": size, "of_order_0": round(size / bound, 4), "seconds": round(seconds, 1)})
    return rows


def divergence(original: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats, from logits (..., V) to others: a cost that no target's luck hides."""
    return float(
        F.kl_div(other.log_softmax(-1), original.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    )


def main() -> None:
    """Compare, or say in a line why not."""
    try:
        compare()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def compare() -> None:
    """Round, write, read back and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", type=Path, help="checkpoint; its averaged weights are stored if there are any")
    parser.add_argument("--data", required=True, help="folder of prepared shards")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5], help="bits per parameter of the files")
    parser.add_argument("--targets", type=int, default=500_000, help="validation targets that are scored")
    parser.add_argument("--sequences", type=int, default=64, help="training sequences for the calibration")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    options = parser.parse_args()
    if options.targets < options.length:
        raise UserError(f"--targets {options.targets} does not fill one sequence of --length {options.length}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = stored_weights(options.ckpt, "best")
    config, state = weights.model, {name: tensor.to(device) for name, tensor in weights.state.items()}
    parameters = sum(tensor.numel() for tensor in state.values())
    data = TokenData(Shards(options.data), 8 * options.length, options.length, vocab_size=config.vocab_size)
    data.setup("fit")
    plain = EvaluationConfig(options.length, None, 8, None, options.targets)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "artifact.zst"

    def loaded(tensors: dict[str, Tensor]) -> Transformer:
        model = Transformer(config).to(device)
        model.load_state_dict(tensors)
        return model

    def loss_of(model: Transformer) -> tuple[float, float]:
        assert data.table is not None
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            result = score(model.nll, data.val_tokens.to(device), data.table, plain)
        return result.loss, result.bpb

    original = loaded(state)
    base = loss_of(original)
    windows = data.val_tokens[: options.targets // options.length * options.length].view(-1, options.length).to(device)

    def divergence_of(model: Transformer) -> float:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return sum(divergence(original(ids), model(ids)) for ids in windows.split(1)) / len(windows)

    rows: list[dict[str, object]] = []

    def row(name: str, dtypes: dict[str, str], rounded: dict[str, StoredTensor], codec: str) -> int:
        size = write_artifact(path, config, state, dtypes, "0" * 64, rounded, codec)  # type: ignore[arg-type]
        stored = loaded({key: value.to(device) for key, value in read_artifact(path).state.items()})
        loss, bpb = loss_of(stored)
        rows.append(
            {
                "method": name,
                "codec": codec,
                "bytes": size,
                "bits": round(8 * size / parameters, 3),
                "divergence": round(divergence_of(stored), 6),
                "loss_rise": round(loss - base[0], 5),
                "bpb_rise": round(bpb - base[1], 5),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        return size

    reference = QuantizationConfig()
    dtypes = {name: storage_dtype(name, tensor, config, reference) for name, tensor in state.items()}
    row("reference: int5 MLP, int6 attention, float16 embedding", dtypes, {}, "zstd-22")
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        moments = calibrate(loaded(state), data.calibration_sequences(options.sequences, device))
    calibration_seconds = time.perf_counter() - started
    methods: dict[str, tuple[Round, float]] = {
        "GPTQ, steps by row deviation": (row_deviations(state, moments, 1.0), 0.4),
        "the same, embedding 4 times finer": (row_deviations(state, moments, 4.0), 0.4),
        "loss-aware": (LossAwareRounding(state, moments).round, 2e-4),
    }
    for bits in options.bits:
        for name, (rounded, start) in methods.items():
            size_of = lambda tensors: write_artifact(path, config, state, dtypes, "0" * 64, tensors, "ans")  # noqa: E731
            step = at_size(rounded, size_of, int(bits * parameters / 8), start)
            row(name, dtypes, rounded(step), "ans")
    for line in codecs(methods["loss-aware"][0](step)):
        print(json.dumps(line), flush=True)
    report(
        f"quantize {options.ckpt}",
        {
            "parameters": parameters,
            "loss": round(base[0], 5),
            "bpb": round(base[1], 5),
            "calibration_s": round(calibration_seconds, 1),
        },
        device,
    )


if __name__ == "__main__":
    main()
