"""The file of a compressed model, without torch: what `docs/artifact.md` specifies. It holds no pickle."""

import hashlib
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import zstandard

from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.quantize import entropy_coding

MAGIC = b"GOLFLM"
VERSION = b"03"
START = len(MAGIC) + len(VERSION) + 32  # offset of the zstd frame, which follows its sha256
Codec = Literal["zstd-22", "ans"]
CODECS = get_args(Codec)
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
FLOATS: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SCALE = FLOATS["float16"]
EXPONENTS_PER_OCTAVE = 8  # of a column's scale
MAX_FILE = 2**28
# A reader must not believe more than a file can honestly hold: its content, and the symbols that are coded together,
# have at most MIN_CONTENT bytes and MAX_RATIO for each byte of the file.
MAX_RATIO = 256
MIN_CONTENT = 2**20
MAX_HEADER = 2**20  # bytes of JSON

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored.

    Attributes:
        kind: int2 to int8, float16 or float32.
        values: Symbols (int8) or floats, in the tensor's shape.
        scale: (rows,) float16 of an integer kind: a row's values are its symbols times this.
        columns: (cols,) int8 or None: a column's values are also multiplied by 2^(this / EXPONENTS_PER_OCTAVE).
    """

    kind: str
    values: Array
    scale: Array | None = None
    columns: Array | None = None

    def floats(self) -> Array:
        """The tensor in float32."""
        if self.scale is None:
            return self.values.astype(np.float32)
        rows = self.values.reshape(len(self.scale), -1).astype(np.float32) * self.scale.astype(np.float32)[:, None]
        if self.columns is not None:
            rows *= np.exp2(self.columns.astype(np.float32) / EXPONENTS_PER_OCTAVE)
        return rows.reshape(self.values.shape)


def write_container(
    path: str | Path, header: dict[str, Any], tensors: dict[str, StoredTensor], codec: Codec = "zstd-22"
) -> int:
    """Write a file; the same content gives the same bytes with one version of zstandard.

    Args:
        path: The file.
        header: Plain values for the reader; `tensors` and `codec` are added.
        tensors: Tensors by name. The file sorts them by kind: neighbors of one kind share statistics, which helps zstd.
        codec: Entropy coder of the symbols: zstd itself, or `entropy_coding`, whose output zstd cannot shorten.

    Returns:
        Bytes of the file.
    """
    table: list[dict[str, Any]] = []
    body: list[bytes] = []
    coded: list[tuple[Array, tuple[Array, Array]]] = []
    offset = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].kind, name)):
        tensor = tensors[name]
        if not all(np.isfinite(part.astype(np.float32)).all() for part in _floats_of(tensor)):
            raise UserError(
                f"{path}: the tensor {name} holds a value that {tensor.kind if tensor.scale is None else 'float16'} "
                "cannot store (not finite, or too large): the training diverged; lower the learning rate"
            )
        parts = encode(tensor)
        if codec == "ans" and tensor.scale is not None:
            rows = tensor.values.reshape(len(tensor.scale), -1)
            coded.append((rows, entropy_coding.classes_of(rows)))
            parts = [each.tobytes() for each in coded[-1][1]] + parts[1:]
        stored = b"".join(parts)
        table.append({"name": name, "kind": tensor.kind, "shape": list(tensor.values.shape), "offset": offset})
        if tensor.columns is not None:
            table[-1]["columns"] = True
        offset += len(stored)
        body.append(stored)
    header = {**header, "tensors": table, "codec": codec}
    if coded:
        frequencies, words = entropy_coding.encode([rows for rows, _ in coded], [classes for _, classes in coded])
        header |= {"tables": len(frequencies), "words": len(words)}
        body += [*_planes(frequencies), words.astype("<u4").tobytes()]
    encoded = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    content = b"".join([struct.pack("<I", len(encoded)), encoded, *body])
    frame = compress(content)
    with atomic_write(path) as file:
        file.write(MAGIC + VERSION + hashlib.sha256(frame).digest() + frame)
    return START + len(frame)


def _floats_of(tensor: StoredTensor) -> list[Array]:
    """The numbers of a tensor as the file holds them, but its symbols."""
    with np.errstate(over="ignore"):
        return [tensor.values.astype(FLOATS[tensor.kind])] if tensor.scale is None else [tensor.scale.astype(SCALE)]


def compressed_size(tensors: list[StoredTensor], codec: Codec) -> int:
    """Bytes of tensors that are compressed without the others and without a header."""
    parts = [encode(tensor) for tensor in tensors]
    if codec != "ans":
        return len(compress(b"".join(stream for part in parts for stream in part)))
    coded = [tensor.values.reshape(len(tensor.scale), -1) for tensor in tensors if tensor.scale is not None]
    others = [
        stream for tensor, part in zip(tensors, parts, strict=True) for stream in part[int(tensor.scale is not None) :]
    ]
    if not coded:
        return len(compress(b"".join(others)))
    classes = [entropy_coding.classes_of(rows) for rows in coded]
    tables, words = entropy_coding.encode(coded, classes)
    others += [*_planes(tables), *(each.tobytes() for pair in classes for each in pair)]
    return len(compress(b"".join(others))) + words.nbytes


def read_container(path: str | Path, content: bytes | None = None) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read and check a file of `write_container`.

    Args:
        path: The file.
        content: Its bytes, if they were read already.

    Returns:
        Its header and its tensors by name.

    Raises:
        UserError: If it is damaged, of an unknown version, or contradicts its header.
    """
    try:
        if (size := Path(path).stat().st_size if content is None else len(content)) > MAX_FILE:
            raise UserError(f"{path}: has {size:,} bytes; a model artifact has at most {MAX_FILE:,}")
        raw = Path(path).read_bytes() if content is None else content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not raw.startswith(MAGIC):
        raise UserError(f"{path}: is not a model artifact (it does not start with {MAGIC.decode()})")
    if len(raw) < START:
        raise UserError(f"{path}: is truncated; copy or export it again")
    if (version := raw[len(MAGIC) : len(MAGIC) + len(VERSION)]) != VERSION:
        raise UserError(
            f"{path}: has artifact version {version.decode('ascii', 'replace')!r}, but only {VERSION.decode()} is known"
        )
    frame = memoryview(raw)[START:]
    if hashlib.sha256(frame).digest() != raw[START - 32 : START]:
        raise UserError(f"{path}: is damaged (its checksum does not match); copy or export it again")
    try:
        limit = MIN_CONTENT + MAX_RATIO * len(raw)
        body = memoryview(_decompress(frame, limit))
        del frame, raw
        length = struct.unpack_from("<I", body)[0]
        if length > MAX_HEADER:
            raise ValueError(f"its header of {length:,} bytes is longer than {MAX_HEADER:,}")
        header = json.loads(bytes(body[4 : 4 + length]).decode("utf-8"))
        if not isinstance(header, dict) or header.get("codec") not in CODECS:
            raise ValueError(f"its header names no codec, or none of {', '.join(CODECS)}")
        return header, _tensors(header, body[4 + length :], limit)
    except KeyError as error:
        raise UserError(f"{path}: is not a valid artifact (its header lacks {error})") from error
    except (ValueError, TypeError, struct.error, zstandard.ZstdError, RecursionError) as error:
        raise UserError(f"{path}: is not a valid artifact ({error})") from error


def encode(tensor: StoredTensor) -> list[bytes]:
    """A tensor's bytes in the file, in parts of one type: symbols, byte planes of floats, exponents of columns."""
    if tensor.scale is None:
        return _planes(tensor.values.astype(FLOATS[tensor.kind]))
    columns = [] if tensor.columns is None else [tensor.columns.tobytes()]
    return [np.ascontiguousarray(tensor.values).tobytes(), *_planes(tensor.scale.astype(SCALE)), *columns]


def compress(content: bytes) -> bytes:
    """One zstd frame: level 22 without short matches.

    Weights hardly repeat: a match of 3 to 6 bytes costs more than the same symbols under Huffman coding. On the 25.5 M
    parameters of the reference recipe the plain level 22 took 16,596,645 bytes, this 15,589,480.
    """
    settings = zstandard.ZstdCompressionParameters.from_level(22, min_match=7, write_checksum=1, write_content_size=1)
    return zstandard.ZstdCompressor(compression_params=settings).compress(content)


def _decompress(frame: memoryview, limit: int) -> bytes:
    size = zstandard.frame_content_size(frame)
    if not 0 < size <= limit:
        raise ValueError(f"its content of {size:,} bytes is not between 1 and {limit:,}, which its size allows")
    if not zstandard.get_frame_parameters(frame).has_checksum:
        raise ValueError("its frame has no checksum")
    # Into a buffer of that size: blocks that hold more than the frame's header claims are an error, not memory.
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)


def _planes(values: Array) -> list[bytes]:
    """Floats as byte planes: all first bytes, then all second bytes, and so on, which compress better separately."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return [plane.tobytes() for plane in flat.view(np.uint8).reshape(-1, flat.itemsize).T]


class _Reader:
    """Reads the content from front to back, never past its end."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def take(self, count: int) -> memoryview:
        block = self.content[self.position : self.position + count]
        if len(block) != count:
            raise ValueError("it holds fewer bytes than its tensors need")
        self.position += count
        return block

    def planes(self, count: int, dtype: np.dtype[Any]) -> Array:
        planes = np.frombuffer(self.take(count * dtype.itemsize), dtype=np.uint8).reshape(dtype.itemsize, count)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(count)


def _tensors(header: dict[str, Any], content: memoryview, max_symbols: int) -> dict[str, StoredTensor]:
    reader = _Reader(content)
    coded = header["codec"] == "ans"
    tensors: dict[str, StoredTensor] = {}
    classes: dict[str, tuple[Array, Array]] = {}
    symbols_left = max_symbols
    for entry in header["tensors"]:
        name, kind, shape = entry["name"], entry["kind"], entry["shape"]
        if not isinstance(name, str) or name in tensors:
            raise ValueError(f"the tensor name {name!r} is not a text, or occurs twice")
        if not all(type(size) is int and 0 < size < 2**31 for size in shape):
            raise ValueError(f"tensor {name!r} has the shape {shape}")
        if entry["offset"] != reader.position:
            raise ValueError(f"tensor {name!r} starts at {entry['offset']}, not where the one before it ends")
        count = math.prod(shape)
        if (columns := entry.get("columns", False)) not in (False, True) or (columns and kind not in INTEGERS):
            raise ValueError(f"tensor {name!r} of the kind {kind!r} has the columns {columns!r}")
        if kind in INTEGERS and shape:
            rows = count // shape[-1]
            if coded:
                if (symbols_left := symbols_left - count) < 0:  # a small file could claim that
                    raise ValueError(f"tensor {name!r} of shape {shape} is too large")
                sizes = np.frombuffer(reader.take(rows + shape[-1]), dtype=np.int8)
                classes[name] = sizes[:rows], sizes[rows:]
                symbols = np.zeros(0, dtype=np.int8)  # they follow all tensors
            else:
                symbols = np.frombuffer(reader.take(count), dtype=np.int8).reshape(shape)
            scale = reader.planes(rows, SCALE)
            exponents = np.frombuffer(reader.take(shape[-1]), dtype=np.int8) if columns else None
            tensors[name] = StoredTensor(kind, symbols, scale, exponents)
        elif kind in FLOATS:
            tensors[name] = StoredTensor(kind, reader.planes(count, FLOATS[kind]).reshape(shape))
        else:
            raise ValueError(f"tensor {name!r} of shape {shape} has the unknown kind {kind!r}")
    if coded and classes:
        shapes = {entry["name"]: entry["shape"] for entry in header["tensors"]}
        num_tables, num_words = header["tables"], header["words"]
        if not all(type(number) is int and 0 <= number < 2**31 for number in (num_tables, num_words)):
            raise ValueError("its numbers of tables and words are out of range")
        frequencies = reader.planes(num_tables * entropy_coding.SYMBOLS, np.dtype("<u2"))
        stream = np.frombuffer(reader.take(4 * num_words), dtype="<u4").astype(np.uint32)
        matrices = entropy_coding.decode(
            [(len(rows), len(columns)) for rows, columns in classes.values()],
            list(classes.values()),
            frequencies.reshape(num_tables, -1),
            stream,
        )
        for (name, tensor), matrix in zip([(name, tensors[name]) for name in classes], matrices, strict=True):
            tensors[name] = replace(tensor, values=matrix.reshape(shapes[name]))
    if reader.position != len(content):
        raise ValueError("its tensors do not fill its content exactly once")
    for name, tensor in tensors.items():
        if tensor.kind in INTEGERS:
            limit = 2 ** (INTEGERS[tensor.kind] - 1)
            if tensor.values.min() < -limit or tensor.values.max() >= limit:
                raise ValueError(f"tensor {name!r} holds a symbol that {tensor.kind} does not have")
        if not np.isfinite(tensor.values if tensor.scale is None else tensor.scale).all():
            raise ValueError(f"tensor {name!r} holds a number that is not finite")
    return tensors
