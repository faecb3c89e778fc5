"""Coded matrices decode exactly, near their entropy; damage is detected; the specification is enough for a reader."""

import json
import struct
from pathlib import Path

import constriction
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.quantize.test_quantize import container_of
from trainer.errors import UserError
from trainer.quantize.container import StoredTensor, compressed_size, read_container, write_container
from trainer.quantize.entropy_coding import classes_of, decode, encode

matrices = arrays.arrays(
    np.int8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-127, 127)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(matrices, min_size=1, max_size=4))
def test_every_matrix_decodes_exactly(symbols: list[np.ndarray]):
    classes = [classes_of(each) for each in symbols]
    tables, words = encode(symbols, classes)
    decoded = decode([each.shape for each in symbols], classes, tables, words)
    assert all(np.array_equal(one, other) for one, other in zip(symbols, decoded, strict=True))


def normal(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, float]:
    """Symbols whose spread depends on row and column, and the bits of a coder that knows these spreads."""
    spread = rng.uniform(0.5, 8, (rows, 1)) * rng.uniform(0.3, 2, (1, columns))
    symbols = np.clip(np.round(rng.normal(size=(rows, columns)) * spread), -127, 127).astype(np.int8)
    return symbols, float(np.log2(spread * np.sqrt(2 * np.pi * np.e)).clip(0).sum())


def test_classes_come_within_3_percent_of_the_bound_where_one_table_for_all_is_10_percent_above():
    symbols, bound = normal(np.random.default_rng(0), 600, 800)
    classes = classes_of(symbols)
    tables, words = encode([symbols], [classes])
    side = len(zstandard.compress(tables.tobytes())) + sum(map(len, classes))
    counts = np.bincount(symbols.reshape(-1).astype(int) + 127)
    counts = counts[counts > 0]
    order_0 = -(counts * np.log2(counts / symbols.size)).sum()
    assert 8 * (words.nbytes + side) < 1.03 * bound
    assert order_0 > 1.1 * bound


def test_cut_changed_or_missing_words_and_tables_are_refused():
    symbols, _ = normal(np.random.default_rng(1), 30, 40)
    classes = [classes_of(symbols)]
    tables, words = encode([symbols], classes)
    for wrong in (words[:-1], np.concatenate([words[:1], words]), words[::-1]):
        with pytest.raises(ValueError, match="do not end"):
            decode([symbols.shape], classes, tables, wrong.copy())
    with pytest.raises(ValueError, match="fewer tables"):
        decode([symbols.shape], classes, tables[:-1], words)
    with pytest.raises(ValueError, match="do not end"):
        decode([symbols.shape], classes, np.concatenate([tables, tables[:1]]), words)
    with pytest.raises(ValueError, match="empty"):
        decode([symbols.shape], classes, np.zeros_like(tables), words)


@pytest.fixture
def stored() -> dict[str, StoredTensor]:
    rng = np.random.default_rng(2)
    scale = lambda rows: rng.uniform(0.01, 1, rows).astype(np.float16)  # noqa: E731
    return {
        "a": StoredTensor("int8", normal(rng, 20, 30)[0], scale(20), rng.integers(-20, 20, 30).astype(np.int8)),
        "b": StoredTensor("int5", rng.integers(-16, 16, (4, 7)).astype(np.int8), scale(4)),
        "c": StoredTensor("float16", rng.normal(size=(3, 5)).astype(np.float16)),
    }


def test_both_codecs_hold_the_same_tensors(stored: dict[str, StoredTensor], tmp_path: Path):
    for codec in ("zstd-22", "ans"):
        write_container(tmp_path / codec, {"key": "value"}, stored, codec)
        header, tensors = read_container(tmp_path / codec)
        assert header["codec"] == codec
        for name, tensor in stored.items():
            assert np.array_equal(tensors[name].values, tensor.values)
            assert np.array_equal(tensors[name].floats(), tensor.floats())
    expected = stored["a"].values * stored["a"].scale.astype(np.float64)[:, None] * 2 ** (stored["a"].columns / 8)
    assert np.allclose(stored["a"].floats(), expected, rtol=1e-6)


def test_the_sizes_of_all_tensors_are_about_that_of_the_file(tmp_path: Path):
    rng = np.random.default_rng(3)
    tensors = {
        "a": StoredTensor("int8", normal(rng, 200, 300)[0], np.ones(200, np.float16), np.zeros(300, np.int8)),
        "b": StoredTensor("int8", normal(rng, 300, 200)[0], np.ones(300, np.float16)),
        "c": StoredTensor("float16", rng.normal(size=(30, 50)).astype(np.float16)),
    }
    for codec in ("zstd-22", "ans"):
        size = write_container(tmp_path / codec, {}, tensors, codec)
        assert compressed_size(list(tensors.values()), codec) == pytest.approx(size, rel=0.01)
        assert sum(compressed_size([tensor], codec) for tensor in tensors.values()) == pytest.approx(size, rel=0.05)


def test_the_specification_is_enough_to_read_coded_symbols(stored: dict[str, StoredTensor], tmp_path: Path):
    """A reader written from docs/artifact.md alone."""
    write_container(tmp_path / "a", {}, stored, "ans")
    content = zstandard.ZstdDecompressor().decompress((tmp_path / "a").read_bytes()[40:])
    (length,) = struct.unpack("<I", content[:4])
    header, payload = json.loads(content[4 : 4 + length]), content[4 + length :]
    classes, shapes, end = {}, {}, 0
    for entry in header["tensors"]:
        at, shape = entry["offset"], entry["shape"]
        assert at == end
        if entry["kind"].startswith("int"):
            rows, columns = shape
            sizes = np.frombuffer(payload, np.int8, rows + columns, at).astype(int)
            classes[entry["name"]] = np.clip(sizes[:rows, None] + sizes[rows:], -32, 40)
            shapes[entry["name"]] = shape
            end = at + rows + columns + 2 * rows + (columns if entry.get("columns") else 0)
        else:
            end = at + 2 * int(np.prod(shape))
    planes = np.frombuffer(payload, np.uint8, header["tables"] * 255 * 2, end).reshape(2, -1)
    tables = (planes[0] + 256 * planes[1].astype(int)).reshape(header["tables"], 255)
    words = np.frombuffer(payload, "<u4", header["words"], end + tables.size * 2)
    coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32))
    symbols = {name: np.empty(shape, int) for name, shape in shapes.items()}
    for table, index in zip(tables, sorted({int(c) for each in classes.values() for c in each.flat}), strict=True):
        frequencies = (table % 32) * 2.0 ** np.minimum(table // 32, 40)
        model = constriction.stream.model.Categorical(frequencies, perfect=False)
        decoded = list(coder.decode(model, sum((each == index).sum() for each in classes.values())) - 127)
        for name, each in classes.items():
            count = int((each == index).sum())
            symbols[name][each == index], decoded = decoded[:count], decoded[count:]
    assert coder.is_empty()
    for name in shapes:
        assert np.array_equal(symbols[name], stored[name].values)


def test_a_small_file_cannot_claim_much_memory(tmp_path: Path):
    zeros = {str(n): StoredTensor("int8", np.zeros((2, 3), np.int8), np.ones(2, np.float16)) for n in range(3)}
    write_container(tmp_path / "a", {}, zeros, "ans")
    raw = (tmp_path / "a").read_bytes()
    content = zstandard.ZstdDecompressor().decompress(raw[40:])
    (length,) = struct.unpack("<I", content[:4])
    header = json.loads(content[4 : 4 + length])
    rows = columns = 2**15
    for entry in header["tensors"]:
        entry["shape"] = [rows, columns]
        entry["offset"] = header["tensors"].index(entry) * (3 * rows + columns)
    encoded = json.dumps(header).encode()
    forged = struct.pack("<I", len(encoded)) + encoded + bytes(3 * (3 * rows + columns)) + bytes(2000)
    (tmp_path / "a").write_bytes(container_of(zstandard.ZstdCompressor(write_checksum=True).compress(forged)))
    with pytest.raises(UserError, match="too large"):
        read_container(tmp_path / "a")
