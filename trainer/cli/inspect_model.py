"""What `trainer inspect` shows of a model file: its options, and its tensors without the numbers of their blocks."""

import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.checkpoint import METADATA_KEY, live_state, stored_average
from trainer.files import sha256_of
from trainer.loading import is_artifact, load_run
from trainer.quantize.container import VERSION, encode, read_container
from trainer.report.byte_use import entropy_bytes
from trainer.run_folder import RunFolder


class Row(NamedTuple):
    """Tensors that differ only in the number of their block."""

    name: str
    kind: str
    shape: list[int]
    tensors: int
    bits: float  # of all of them: entropy in an artifact, memory in a checkpoint


def inspect_model(path: Path, tokenizer: Path | None) -> None:
    """Print the content of an artifact or of a checkpoint.

    Args:
        path: The file.
        tokenizer: SentencePiece model to compare with; None: `tokenizer.model` of its run.

    Raises:
        UserError: If it is neither, or is damaged.
    """
    if is_compressed := is_artifact(path, or_checkpoint=True):
        header, stored = read_container(path)
        config, sha256 = header.get("model"), header.get("tokenizer_sha256")
        print(f"artifact of version {VERSION.decode()}, {header['codec']}, {path.stat().st_size:,} bytes")
        tensors = {
            name: (tensor.kind, tensor.values.shape, 8 * sum(map(entropy_bytes, encode(tensor))))
            for name, tensor in stored.items()
        }
    else:
        checkpoint = load_run(path)
        metadata = checkpoint[METADATA_KEY]
        config, sha256 = metadata["model"], metadata["tokenizer_sha256"]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(metadata["saved_at"]))
        average = "averaged and live weights" if stored_average(checkpoint) else "live weights alone"
        step = f"checkpoint after step {checkpoint['global_step']:,} of {when}"
        print(f"{step}, {average}, {path.stat().st_size:,} bytes")
        tensors = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 8.0 * tensor.nbytes)
            for name, tensor in live_state(checkpoint).items()
        }
    print(f"tokenizer  sha256 {sha256}\n           {_tokenizer(path, tokenizer, sha256)}\n")
    print(yaml.safe_dump({"model": config}, sort_keys=False, default_flow_style=None).rstrip() + "\n")
    print_table(grouped(tensors))
    if is_compressed:
        print("\nbits each: zeroth-order entropy of the stored bytes, scales included; the file itself may need less")


def _tokenizer(path: Path, tokenizer: Path | None, sha256: object) -> str:
    """How a tokenizer's file compares with the one of the training."""
    tokenizer = tokenizer or RunFolder.containing(path).tokenizer
    if not tokenizer.is_file():
        return f"{tokenizer} is missing; the model is of no use without its tokenizer"
    return f"{tokenizer} is {'the same' if sha256_of(tokenizer) == sha256 else 'another one'}"


def grouped(tensors: dict[str, tuple[str, tuple[int, ...], float]]) -> list[Row]:
    """One row for tensors of one name, kind and shape, whatever their block; in the order of the model's tensors.

    Args:
        tensors: Kind, shape and bits by name.
    """
    rows: dict[tuple[str, str, tuple[int, ...]], Row] = {}
    for name in sorted(tensors, key=_natural):
        kind, shape, bits = tensors[name]
        key = re.sub(r"\.\d+\.", ".*.", name), kind, shape
        before = rows.get(key, Row(key[0], kind, list(shape), 0, 0.0))
        rows[key] = before._replace(tensors=before.tensors + 1, bits=before.bits + bits)
    return list(rows.values())


def _natural(name: str) -> list[Any]:
    """Key that sorts blocks.2 before blocks.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]


def print_table(rows: list[Row]) -> None:
    """Print the rows, and their sum."""
    width = max(len(row.name) for row in rows)

    def show(*cells: str) -> None:
        name, kind, shape, count, parameters, bits = cells
        print(f"{name:<{width}}  {kind:<8}  {shape:<12}  {count:>5}  {parameters:>12}  {bits:>9}")

    show("tensor", "kind", "shape", "count", "parameters", "bits each")
    numbers = [row.tensors * math.prod(row.shape) for row in rows]
    for row, number in zip(rows, numbers, strict=True):
        shape = " x ".join(map(str, row.shape)) or "number"
        show(row.name, row.kind, shape, str(row.tensors), f"{number:,}", f"{row.bits / number:.2f}")
    bits = sum(row.bits for row in rows) / sum(numbers)
    show("all", "", "", str(sum(row.tensors for row in rows)), f"{sum(numbers):,}", f"{bits:.2f}")
