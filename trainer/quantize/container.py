"""The file that holds a compressed model, without torch: what `docs/artifact.md` specifies. No pickle in it."""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from trainer.errors import UserError
from trainer.files import atomic_write

MAGIC = b"GOLFLM"
VERSION = b"02"
START = len(MAGIC) + len(VERSION) + 32  # where the zstd frame begins, after the sha256 of it
CODEC = "zstd-22"
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
FLOATS: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SCALE = FLOATS["float16"]
MAX_FILE = 2**28
MAX_CONTENT = 2**30  # no model of the challenge comes near; a reader must not believe a larger promise

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored.

    Attributes:
        kind: int2 to int8, float16 or float32.
        values: Symbols (int8) or floats, in the tensor's shape.
        scale: (rows,) float16 of an integer kind: a row's values are its symbols times this.
    """

    kind: str
    values: Array
    scale: Array | None = None

    def floats(self) -> Array:
        """The tensor in float32."""
        if self.scale is None:
            return self.values.astype(np.float32)
        rows = self.values.reshape(len(self.scale), -1).astype(np.float32)
        return (rows * self.scale.astype(np.float32)[:, None]).reshape(self.values.shape)


def write_container(path: str | Path, header: dict[str, Any], tensors: dict[str, StoredTensor]) -> int:
    """Write a file; the same content gives the same bytes with one version of zstandard.

    Args:
        path: The file.
        header: Plain values for the reader; `tensors` and `codec` are added.
        tensors: By name. Sorted by kind: neighbours of one kind share statistics, which the codec profits from.

    Returns:
        Bytes of the file.
    """
    table: list[dict[str, Any]] = []
    body: list[bytes] = []
    offset = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].kind, name)):
        tensor = tensors[name]
        stored = b"".join(encode(tensor))
        table.append({"name": name, "kind": tensor.kind, "shape": list(tensor.values.shape), "offset": offset})
        offset += len(stored)
        body.append(stored)
    encoded = json.dumps({**header, "tensors": table, "codec": CODEC}, separators=(",", ":"), sort_keys=True).encode()
    content = b"".join([struct.pack("<I", len(encoded)), encoded, *body])
    frame = compress(content)
    with atomic_write(path) as file:
        file.write(MAGIC + VERSION + hashlib.sha256(frame).digest() + frame)
    return START + len(frame)


def read_container(path: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read and check a file of `write_container`.

    Returns:
        Its header and its tensors by name.

    Raises:
        UserError: If it is damaged, unknown or not what its header says.
    """
    try:
        if (size := Path(path).stat().st_size) > MAX_FILE:
            raise UserError(f"{path}: has {size:,} bytes; a model artifact has at most {MAX_FILE:,}")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not raw.startswith(MAGIC):
        raise UserError(f"{path}: is not a model artifact (it does not start with {MAGIC.decode()})")
    if (version := raw[len(MAGIC) : len(MAGIC) + len(VERSION)]) != VERSION:
        raise UserError(
            f"{path}: has artifact version {version.decode('ascii', 'replace')!r}, but only {VERSION.decode()} is known"
        )
    frame = memoryview(raw)[START:]
    if hashlib.sha256(frame).digest() != raw[START - 32 : START]:
        raise UserError(f"{path}: is damaged (its checksum does not match); copy or export it again")
    try:
        content = memoryview(_decompress(frame))
        del frame, raw
        length = struct.unpack_from("<I", content)[0]
        header = json.loads(bytes(content[4 : 4 + length]))
        if header["codec"] != CODEC:
            raise ValueError(f"unknown codec {header['codec']!r}")
        return header, _tensors(header["tensors"], content[4 + length :])
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError, RecursionError) as error:
        raise UserError(f"{path}: is not a valid artifact ({error})") from error


def encode(tensor: StoredTensor) -> list[bytes]:
    """A tensor's bytes in the payload, in parts of one kind: symbols, then planes of floats."""
    if tensor.scale is None:
        return _planes(tensor.values.astype(FLOATS[tensor.kind]))
    return [np.ascontiguousarray(tensor.values).tobytes(), *_planes(tensor.scale.astype(SCALE))]


def compress(content: bytes) -> bytes:
    """One zstd frame: level 22 without short matches.

    Weights hardly repeat: a match of 3 to 6 bytes costs more than the same symbols under Huffman coding. On the 25.5 M
    parameters of the reference recipe the plain level 22 took 16,596,645 bytes, this 15,589,480.
    """
    settings = zstandard.ZstdCompressionParameters.from_level(22, min_match=7, write_checksum=1, write_content_size=1)
    return zstandard.ZstdCompressor(compression_params=settings).compress(content)


def _decompress(frame: memoryview) -> bytes:
    size = zstandard.frame_content_size(frame)
    if not 0 < size <= MAX_CONTENT:
        raise ValueError(f"its content of {size:,} bytes is not between 1 and {MAX_CONTENT:,}")
    if not zstandard.get_frame_parameters(frame).has_checksum:
        raise ValueError("its frame has no checksum")
    # Into a buffer of that size: blocks that hold more than their frame's header says are an error, not memory.
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)


def _planes(values: Array) -> list[bytes]:
    """Floats as byte planes: all first bytes, then all second bytes, ..., which compress better apart."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return [plane.tobytes() for plane in flat.view(np.uint8).reshape(-1, flat.itemsize).T]


class _Reader:
    """Takes slices off the content, never past its end."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def take(self, count: int) -> memoryview:
        piece = self.content[self.position : self.position + count]
        if len(piece) != count:
            raise ValueError("it holds fewer bytes than its tensors need")
        self.position += count
        return piece

    def floats(self, count: int, dtype: np.dtype[Any]) -> Array:
        planes = np.frombuffer(self.take(count * dtype.itemsize), dtype=np.uint8).reshape(dtype.itemsize, count)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(count)


def _tensors(table: list[dict[str, Any]], content: memoryview) -> dict[str, StoredTensor]:
    reader = _Reader(content)
    found: dict[str, StoredTensor] = {}
    for entry in table:
        name, kind, shape = entry["name"], entry["kind"], entry["shape"]
        if not isinstance(name, str) or name in found:
            raise ValueError(f"the tensor name {name!r} is no text, or there twice")
        if not all(type(size) is int and 0 < size < 2**31 for size in shape):
            raise ValueError(f"tensor {name} has the shape {shape}")
        if entry["offset"] != reader.position:
            raise ValueError(f"tensor {name} lies at {entry['offset']}, not where the one before it ends")
        count = math.prod(shape)
        if kind in INTEGERS and shape:
            symbols = np.frombuffer(reader.take(count), dtype=np.int8)
            limit = 2 ** (INTEGERS[kind] - 1)
            if symbols.min() < -limit or symbols.max() >= limit:
                raise ValueError(f"tensor {name} holds a symbol that {kind} does not have")
            found[name] = StoredTensor(kind, symbols.reshape(shape), reader.floats(count // shape[-1], SCALE))
        elif kind in FLOATS:
            found[name] = StoredTensor(kind, reader.floats(count, FLOATS[kind]).reshape(shape))
        else:
            raise ValueError(f"tensor {name} of shape {shape} has the unknown kind {kind!r}")
    if reader.position != len(content):
        raise ValueError("its tensors do not fill its content exactly once")
    return found
