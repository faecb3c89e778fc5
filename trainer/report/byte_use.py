"""How an artifact uses its bytes, and how rounding changed its tensors."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.quantize.container import Array, Codec, StoredTensor, compressed_size, encode


@dataclass(frozen=True)
class ByteUse:
    """One group of tensors.

    Attributes:
        group: Name of the group.
        kinds: Storage types of its tensors.
        parameters: Number of parameters.
        bytes: Bytes of the group, compressed by itself.
        entropy_bytes: Bytes of an ideal coder that knows the frequency of each byte, but not its neighbors.
        error: Root mean square of the rounding error, relative to that of the weights; None if the weights are missing.
    """

    group: str
    kinds: str
    parameters: int
    bytes: int
    entropy_bytes: float
    error: float | None

    @property
    def bits(self) -> float:
        """Bits per parameter."""
        return 8 * self.bytes / self.parameters


def group_of(name: str) -> str:
    """The group of a tensor."""
    if name.startswith("blocks.") and name.endswith(".weight"):
        return " ".join(name.split(".")[2:-1])
    for part in ("token_embedding", "value_embedding", "bigram", "head"):
        if name.startswith(part):
            return part.replace("_", " ")
    return "gains, gates, mixes"


def byte_use(tensors: dict[str, StoredTensor], weights: dict[str, Array] | None, codec: Codec) -> list[ByteUse]:
    """Measure every group, the largest first.

    Args:
        tensors: Tensors of an artifact.
        weights: The same before they were rounded, if they still exist.
        codec: Entropy coder of the artifact.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[group_of(name)].append(name)
    uses = []
    for group, names in groups.items():
        streams = [stream for name in names for stream in encode(tensors[name])]
        squares = np.zeros(2)
        for name in names if weights else ():
            assert weights is not None
            squares += [np.square(tensors[name].floats() - weights[name]).sum(), np.square(weights[name]).sum()]
        uses.append(
            ByteUse(
                group,
                ", ".join(sorted({tensors[name].kind for name in names})),
                sum(tensors[name].values.size for name in names),
                compressed_size([tensors[name] for name in names], codec),
                sum(map(entropy_bytes, streams)),
                float(np.sqrt(squares[0] / squares[1])) if squares[1] else None,
            )
        )
    return sorted(uses, key=lambda use: -use.bytes)


def entropy_bytes(stream: bytes) -> float:
    """Bytes that a stream needs where each of its bytes is coded by its own share (zeroth-order entropy)."""
    counts: np.ndarray[Any, Any] = np.bincount(np.frombuffer(stream, dtype=np.uint8))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)
