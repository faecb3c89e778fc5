"""The file that holds a compressed model: a checked header, then raw symbols under zstd. No pickle in it.

Layout: 8 bytes magic, 32 bytes sha256 of all that follows, then one zstd frame with its own checksum. The frame's
content is the length of a JSON header (uint32, little endian), the header, and the tensors back to back in the header's
order: intN as one signed byte a symbol (packing bits first makes the compressed file larger), followed by the rows'
float16 scales; floats as all their low bytes, then all their high bytes (which compress better apart).
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.model.transformer import Transformer, TransformerConfig
from trainer.quantize.intn import dequantize_rows, quantize_rows

MAGIC = b"GOLFLM01"
CODEC = "zstd-22"
MAX_CONTENT = 2**30  # no model of the challenge comes near; a reader must not believe a larger promise


@dataclass(frozen=True)
class Artifact:
    """A model read back from its file.

    Attributes:
        model: Its sizes.
        state: float32 tensors by name.
        tokenizer_sha256: Fingerprint of the tokenizer it was trained with.
    """

    model: TransformerConfig
    state: dict[str, Tensor]
    tokenizer_sha256: str

    def build(self) -> Transformer:
        """The model with these weights.

        Raises:
            UserError: If the tensors are not those of the model.
        """
        model = Transformer(self.model)
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            raise UserError(f"artifact: its tensors do not fit its model ({error})") from error
        return model


def write_artifact(
    path: str | Path, model: TransformerConfig, state: dict[str, Tensor], kinds: dict[str, str], tokenizer_sha256: str
) -> int:
    """Quantise a state and write it.

    Args:
        path: The file.
        model: Sizes of the model.
        state: Its tensors.
        kinds: Stored type of each.
        tokenizer_sha256: Fingerprint of the tokenizer.

    Returns:
        Bytes of the file.
    """
    table: list[dict[str, Any]] = []
    body: list[bytes] = []
    # Neighbours of one kind share statistics, which the codec profits from.
    for name in sorted(state, key=lambda name: (kinds[name], name)):
        table.append({"name": name, "kind": kinds[name], "shape": list(state[name].shape)})
        body.extend(_encode(state[name].detach().cpu(), kinds[name]))
    header = {"model": model.to_dict(), "tensors": table, "tokenizer_sha256": tokenizer_sha256, "codec": CODEC}
    encoded = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    content = b"".join([struct.pack("<I", len(encoded)), encoded, *body])
    frame = zstandard.ZstdCompressor(compression_params=_compression()).compress(content)
    with atomic_write(path) as file:
        file.write(MAGIC + hashlib.sha256(frame).digest() + frame)
    return len(MAGIC) + 32 + len(frame)


def read_artifact(path: str | Path) -> Artifact:
    """Read and check a file of `write_artifact`.

    Raises:
        UserError: If it is damaged, unknown or not what its header says.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    digest, frame = raw[len(MAGIC) : len(MAGIC) + 32], raw[len(MAGIC) + 32 :]
    if not raw.startswith(MAGIC):
        raise UserError(f"{path}: is not a model artifact of this version (it does not start with {MAGIC.decode()})")
    if hashlib.sha256(frame).digest() != digest:
        raise UserError(f"{path}: is damaged (its checksum does not match); copy or export it again")
    try:
        content = _decompress(frame)
        length = struct.unpack_from("<I", content)[0]
        header = json.loads(content[4 : 4 + length])
        if header["codec"] != CODEC:
            raise ValueError(f"unknown codec {header['codec']!r}")
        state = _decode_all(header["tensors"], memoryview(content)[4 + length :])
        return Artifact(TransformerConfig.from_dict(header["model"]), state, str(header["tokenizer_sha256"]))
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError, RecursionError) as error:
        raise UserError(f"{path}: is not a valid artifact ({error})") from error


def _compression() -> zstandard.ZstdCompressionParameters:
    """Level 22 without short matches.

    Weights hardly repeat: a match of 3 to 6 bytes costs more than the same symbols under Huffman coding. On the 25.5 M
    parameters of the reference recipe the plain level 22 took 16,596,645 bytes, this 15,589,480.
    """
    return zstandard.ZstdCompressionParameters.from_level(22, min_match=7, write_checksum=1, write_content_size=1)


def _decompress(frame: bytes) -> bytes:
    size = zstandard.frame_content_size(frame)
    if not 0 < size <= MAX_CONTENT:
        raise ValueError(f"its content of {size:,} bytes is not between 1 and {MAX_CONTENT:,}")
    if not zstandard.get_frame_parameters(frame).has_checksum:
        raise ValueError("its frame has no checksum")
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    content = decompressor.decompress(frame)
    if not decompressor.eof or decompressor.unused_data or len(content) != size:
        raise ValueError("it does not end where its frame ends")
    return content


def _split_bytes(values: np.ndarray) -> bytes:
    """Little-endian floats as byte planes: all first bytes, then all second bytes, ..."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def _encode(tensor: Tensor, kind: str) -> list[bytes]:
    if kind.startswith("int"):
        symbols, scale = quantize_rows(tensor, int(kind[3:]))
        return [symbols.numpy().tobytes(), _split_bytes(scale.numpy().astype("<f2"))]
    return [_split_bytes(tensor.float().numpy().astype("<f2" if kind == "float16" else "<f4"))]


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

    def floats(self, count: int, kind: str) -> Tensor:
        dtype = np.dtype(kind)
        planes = np.frombuffer(self.take(count * dtype.itemsize), dtype=np.uint8).reshape(dtype.itemsize, count)
        return torch.from_numpy(np.ascontiguousarray(planes.T).view(dtype).reshape(count).astype(np.float32))


def _decode_all(table: list[dict[str, Any]], content: memoryview) -> dict[str, Tensor]:
    reader = _Reader(content)
    state: dict[str, Tensor] = {}
    for entry in table:
        name, kind, shape = str(entry["name"]), entry["kind"], entry["shape"]
        if not all(isinstance(size, int) and 0 < size < 2**31 for size in shape):
            raise ValueError(f"tensor {name} has the shape {shape}")
        count = math.prod(shape)
        if kind in ("int2", "int3", "int4", "int5", "int6", "int7", "int8"):
            symbols = torch.from_numpy(np.frombuffer(reader.take(count), dtype=np.int8).copy()).view(shape)
            scale = reader.floats(count // shape[-1], "<f2")
            state[name] = dequantize_rows(symbols, scale)
        elif kind in ("float16", "float32"):
            state[name] = reader.floats(count, "<f2" if kind == "float16" else "<f4").view(shape)
        else:
            raise ValueError(f"tensor {name} has the unknown kind {kind!r}")
    if reader.position != len(content) or len(state) != len(table):
        raise ValueError("its tensors do not fill its content exactly once")
    return state
