"""The quantizer against numpy bit by bit; the artifact against its own promises."""

import gc
import hashlib
import json
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.conftest import TINY
from trainer.errors import UserError
from trainer.model.config import TransformerConfig
from trainer.model.transformer import Transformer
from trainer.quantize import container
from trainer.quantize.artifact import read_artifact, write_artifact
from trainer.quantize.calibration import calibrate
from trainer.quantize.container import (
    MAX_HEADER,
    MAX_RATIO,
    MIN_CONTENT,
    StoredTensor,
    read_container,
    write_container,
)
from trainer.quantize.export import export, store
from trainer.quantize.loss_aware import LossAwareRounding
from trainer.quantize.policy import QuantizationConfig, smaller_configs, storage_dtype
from trainer.quantize.rounding import prune_smallest, quantize_rows

FLOATS = st.floats(-(2.0**12), 2.0**12, width=32)


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=FLOATS),
    st.sampled_from([5, 6, 8]),
)
def test_quantized_rows_equal_numpy_bit_by_bit(w: np.ndarray, bits: int):
    clip = 2 ** (bits - 1) - 1
    scale = np.maximum(np.maximum(np.abs(w).max(1) / np.float32(clip), np.float32(1e-12)), np.float32(2**-14))
    scale = scale.astype(np.float16)
    expected = np.clip(np.rint(w / scale.astype(np.float32)[:, None]), -clip - 1, clip).astype(np.int8)
    symbols, scales = quantize_rows(torch.from_numpy(w), bits)
    assert np.array_equal(symbols.numpy(), expected)
    assert np.array_equal(scales.numpy(), scale)
    stored = StoredTensor(f"int{bits}", symbols.numpy(), scales.numpy()).floats()
    # half a step, and what the clamp takes when float16 rounded the scale down
    step = scale.astype(np.float32)[:, None]
    assert (np.abs(stored - w) <= step * (0.5 + clip * 2.0**-11) * 1.0001).all()
    assert not stored[~w.any(axis=1)].any()


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=FLOATS), st.sampled_from([0.0, 0.03, 0.5]))
def test_pruning_zeroes_exactly_the_smallest_share(w: np.ndarray, fraction: float):
    pruned = prune_smallest(torch.from_numpy(w.copy()), fraction).numpy()
    count = int(fraction * len(w))
    assert np.array_equal(np.sort(np.abs(pruned))[count:], np.sort(np.abs(w))[count:])
    assert not np.sort(np.abs(pruned))[:count].any()


def test_the_reference_policy():
    config = TransformerConfig()
    with torch.device("meta"):
        model = Transformer(config)
    state = model.state_dict()
    dtypes = {name: storage_dtype(name, tensor, config, QuantizationConfig()) for name, tensor in state.items()}
    assert dtypes["token_embedding.weight"] == "float16"
    assert dtypes["bigram.table.weight"] == dtypes["bigram.proj.weight"] == "int6"
    assert [block for block in range(10) if dtypes[f"blocks.{block}.attention.k.weight"] == "float16"] == [8]
    assert {dtypes[f"blocks.{block}.mlp.{part}.weight"] for block in range(10) for part in ("up", "down")} == {"int5"}
    assert {dtypes[f"blocks.{block}.attention.q.weight"] for block in range(10)} == {"int6"}
    assert dtypes["skip_weights"] == dtypes["blocks.3.mix"] == dtypes["smear.gate"] == "float16"


def test_each_kind_of_tensor_has_its_storage_type():
    config = TransformerConfig(num_layers=4)
    quantization = QuantizationConfig(fp16_key_blocks=[1, -1], small_tensor=100, other_bits=7)

    def dtype(name: str, *shape: int) -> str:
        return storage_dtype(name, torch.zeros(shape), config, quantization)

    keys = [dtype(f"blocks.{block}.attention.k.weight", 11, 10) for block in range(4)]
    assert keys == ["int6", "float16", "int6", "float16"]
    assert [dtype("blocks.0.mlp.up.weight", *shape) for shape in ((10, 10), (1, 101))] == ["float16", "int5"]
    assert dtype("value_embedding.weight", 11, 10) == dtype("head.weight", 11, 10) == "int7"
    for name in ("blocks.0.mix", "blocks.0.mlp_scale", "skip_weights", "smear.gate", "blocks.0.attention.q_gain"):
        assert dtype(name, 11, 10) == "float32"


def test_the_steps_of_shrinking_take_bits_from_the_mlp_first():
    def bits(config: QuantizationConfig) -> list[tuple[int, int, int]]:
        return [(each.mlp_bits, each.attention_bits, each.bigram_bits) for each in smaller_configs(config)]

    assert bits(QuantizationConfig()) == [(5, 6, 6), (4, 6, 6), (4, 5, 5), (3, 5, 5), (3, 4, 4)]
    least = QuantizationConfig(mlp_bits=2, attention_bits=2, bigram_bits=2)
    assert bits(least) == [(2, 2, 2)] * 5
    assert {each.prune_frac for each in smaller_configs(least)} == {0.08}
    assert {each.prune_frac for each in smaller_configs(replace(least, prune_frac=0.2))} == {0.2}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in Transformer(TINY).state_dict().items()}
    config = QuantizationConfig(small_tensor=63)  # so that a mix of 2 x 32 is a "larger control vector"
    dtypes = {name: storage_dtype(name, tensor, TINY, config) for name, tensor in state.items()}
    assert storage_dtype("bigram.scale", state["bigram.scale"], TINY, QuantizationConfig(small_tensor=0)) == "float16"
    size = write_artifact(tmp_path / "a.zst", TINY, state, dtypes, "f" * 64)
    assert size == (tmp_path / "a.zst").stat().st_size
    return tmp_path / "a.zst", state, dtypes


def test_an_artifact_returns_the_rounded_weights(written):
    path, state, dtypes = written
    artifact = read_artifact(path)
    assert artifact.model == TINY
    assert artifact.tokenizer_sha256 == "f" * 64
    assert {"int5", "int6", "float16", "float32"} <= set(dtypes.values())
    for name, tensor in state.items():
        dtype = dtypes[name]
        if dtype.startswith("int"):
            symbols, scale = quantize_rows(tensor, int(dtype[3:]))
            rows = symbols.numpy().reshape(len(scale), -1) * scale.numpy().astype(np.float32)[:, None]
            expected = torch.from_numpy(rows.reshape(tensor.shape))
        else:
            expected = tensor.half().float() if dtype == "float16" else tensor
        assert torch.equal(artifact.state[name], expected)
    artifact.build()


def test_equal_weights_give_equal_bytes(written, tmp_path: Path):
    path, state, dtypes = written
    write_artifact(tmp_path / "b.zst", TINY, dict(reversed(state.items())), dtypes, "f" * 64)
    assert (tmp_path / "b.zst").read_bytes() == path.read_bytes()


def test_any_damage_is_refused(written):
    path, _, _ = written
    raw = path.read_bytes()
    for position in [*range(48), *range(48, len(raw), 97)]:
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(UserError):
            read_artifact(path)
    cut = [raw[:length] for length in range(0, len(raw), 1024)]
    for damaged in (raw[:-1], *cut, raw + b"x", raw + raw[40:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            read_artifact(path)


@pytest.mark.parametrize(("claimed", "message"), [(2**31, "not between"), (70_000, "not a valid artifact")])
def test_a_frame_that_holds_another_size_than_it_claims_is_refused(written, claimed: int, message: str):
    path, _, _ = written
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(2**20))
    at = bomb.index((2**20).to_bytes(4, "little"))
    path.write_bytes(container_of(bomb[:at] + claimed.to_bytes(4, "little") + bomb[at + 4 :]))
    with pytest.raises(UserError, match=message):
        read_artifact(path)


def bombs() -> dict[str, bytes]:
    """Small files that claim much."""

    def container(header: dict[str, Any] | bytes, payload: bytes) -> bytes:
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack("<I", len(encoded)) + encoded + payload
        return container_of(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content))

    def tensor(kind: str, *shape: int, **more: object) -> dict[str, Any]:
        return {"name": "w", "kind": kind, "shape": list(shape), "offset": 0, **more}

    plain = {"codec": "zstd-22", "model": {}, "tokenizer_sha256": "0"}
    coded = {**plain, "codec": "ans", "tables": 1, "words": 1}
    sure = np.zeros(255, dtype="<u2")  # one symbol of a table is certain, and needs no bit
    sure[127] = 1
    planes = sure.view(np.uint8).reshape(-1, 2).T.tobytes()
    side = 2**14
    return {
        "zeros": container({**plain, "tensors": [tensor("int2", 2**14, 2**15)]}, bytes(2**29 + 2**15)),
        "floats": container({**plain, "tensors": [tensor("float32", 2**27)]}, bytes(2**29)),
        "coded": container(
            {**coded, "tensors": [tensor("int2", side, side)]}, bytes(2 * side) + bytes(2 * side) + planes + bytes(4)
        ),
        "header": container(b"[" + b"[]," * 2**25 + b"[]]", b""),
        "tables": container({**coded, "tables": 2**30, "tensors": [tensor("int2", 8, 8)]}, bytes(8 + 8 + 16 + 4)),
    }


def test_the_bounds_are_those_of_the_specification(tmp_path: Path):
    """One byte more than they allow is refused for that reason."""
    path = tmp_path / "a"

    def message(content: bytes) -> str:
        frame = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)
        path.write_bytes(container_of(frame))
        with pytest.raises(UserError) as refused:
            read_container(path)
        return str(refused.value)

    def header_of(size: int) -> bytes:
        start, end = b'{"codec": "zstd-22", "tensors": [], "padding": "', b'"}'
        return struct.pack("<I", size) + start + b"x" * (size - len(start + end)) + end + b"more"

    assert "do not fill its content" in message(header_of(2**20))
    assert "its header of 1,048,577 bytes is longer than 1,048,576" in message(header_of(2**20 + 1))
    small = len(container_of(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(bytes(2**20))))
    limit = 2**20 + 256 * small
    assert "not between" not in message(bytes(limit - 4096))
    assert "not between" in message(bytes(limit + 8192))  # its frame is a few bytes longer
    assert "not between" in message(b"")
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(UserError, match=r"has 268,435,457 bytes; a model artifact has at most 268,435,456"):
        read_container(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_container(tmp_path / "nothing")


@pytest.mark.parametrize("codec", ["zstd-22", "ans"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_whole_range_of_symbols_is_stored_and_none_beyond_it(bits: int, codec: str, tmp_path: Path):
    limit = 2 ** (bits - 1)
    values = np.resize(np.arange(max(-limit, -127), limit, dtype=np.int8), (2, 3, 4))
    scale, columns = np.arange(1, 7).astype(np.float16), np.array([0, 8, -8, 3], dtype=np.int8)
    tensor = StoredTensor(f"int{bits}", values, scale, columns)
    write_container(tmp_path / "a", {"z": 1, "a": 2}, {"w": tensor}, codec)
    _, tensors = read_container(tmp_path / "a")
    assert np.array_equal(tensors["w"].values, values)
    expected = values * scale.astype(np.float32).reshape(2, 3, 1) * 2.0 ** (columns / 8)
    assert np.allclose(tensors["w"].floats(), expected)
    write_container(tmp_path / "b", {"a": 2, "z": 1}, {"w": tensor}, codec)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for beyond in (limit, -limit - 1):
        if -127 <= beyond <= 127:
            wrong = values.copy()
            wrong[1, 1, 1] = beyond
            write_container(tmp_path / "c", {}, {"w": replace(tensor, values=wrong)}, codec)
            with pytest.raises(UserError, match=f"tensor 'w' holds a symbol that int{bits} does not have"):
                read_container(tmp_path / "c")


@pytest.mark.parametrize("key", ["tables", "words"])
@pytest.mark.parametrize("value", [-1, 2**31, True, 1.0, "1", None])
def test_counts_of_an_entropy_coded_file_are_checked(key: str, value: object, tmp_path: Path):
    tensor = StoredTensor("int5", np.ones((2, 2), dtype=np.int8), np.ones(2, dtype=np.float16))
    write_container(tmp_path / "a", {}, {"w": tensor}, "ans")
    (tmp_path / "a").write_bytes(forged((tmp_path / "a").read_bytes(), set_in(key, value)))
    with pytest.raises(UserError, match="its numbers of tables and words are out of range"):
        read_container(tmp_path / "a")


@pytest.mark.parametrize("name", ["zeros", "floats", "coded", "header", "tables"])
def test_a_small_file_never_takes_much_memory(name: str, tmp_path: Path):
    content = bombs()[name]
    assert len(content) < 1_000_000
    (tmp_path / "bomb").write_bytes(content)
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read_container(tmp_path / "bomb")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * (MIN_CONTENT + MAX_RATIO * len(content)) + 20 * MAX_HEADER


def test_what_a_file_can_honestly_hold_is_read(tmp_path: Path):
    """Fresh weights: half of the matrices are zero, and nothing compresses better."""
    model = Transformer(TransformerConfig(num_layers=2))
    state = {name: tensor * (tensor.ndim < 2 or "attention" in name) for name, tensor in model.state_dict().items()}
    config = QuantizationConfig()
    dtypes = {name: storage_dtype(name, tensor, model.config, config) for name, tensor in state.items()}
    size = write_artifact(tmp_path / "a.zst", model.config, state, dtypes, "0" * 64)
    assert size < 5_000_000
    assert read_artifact(tmp_path / "a.zst").state.keys() == state.keys()


def test_a_tensor_that_cannot_be_stored_is_named(tmp_path: Path):
    for value in (float("nan"), float("inf"), 1e9):
        tensors = {
            "good": StoredTensor("float16", np.ones(3, dtype=np.float32)),
            "bad": StoredTensor("float16", np.array([0, value], dtype=np.float32)),
        }
        with pytest.raises(UserError, match="the tensor bad holds a value that float16 cannot store"):
            write_container(tmp_path / "a.zst", {}, tensors)
        scales = StoredTensor("int5", np.ones((1, 2), dtype=np.int8), np.array([value], dtype=np.float32))
        with pytest.raises(UserError, match="the tensor scaled holds a value that float16 cannot store"):
            write_container(tmp_path / "a.zst", {}, {"scaled": scales})
    assert not (tmp_path / "a.zst").exists()


def container_of(frame: bytes) -> bytes:
    """A file with a right checksum around a frame."""
    return b"GOLFLM03" + hashlib.sha256(frame).digest() + frame


def forged(raw: bytes, change: Callable[[dict[str, Any]], object], more: bytes = b"") -> bytes:
    """The file with another header and a right checksum, as an attacker would make it."""
    content = zstandard.ZstdDecompressor().decompress(raw[40:])
    length = struct.unpack_from("<I", content)[0]
    header = json.loads(content[4 : 4 + length])
    change(header)
    encoded = json.dumps(header).encode()
    content = struct.pack("<I", len(encoded)) + encoded + content[4 + length :] + more
    return container_of(zstandard.ZstdCompressor(write_checksum=True).compress(content))


def set_in(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(header: Any) -> None:
        for key in keys:
            header = header[key]
        header[last] = value

    return change


FORGERIES = [
    (set_in("codec", "brotli"), "names no codec"),
    (lambda header: header.pop("tensors"), "its header lacks 'tensors'"),
    (set_in("tensors", 1, "offset", 0), "not where the one before it ends"),
    (set_in("tensors", 0, "offset", 1), "not where the one before it ends"),
    (lambda header: header["tensors"][0].pop("offset"), "offset"),
    (set_in("tensors", 0, "shape", [2**31, 2**31]), "has the shape"),
    (set_in("tensors", 0, "shape", [2**30, 2**30, 2**30]), "fewer bytes than its tensors need"),
    (set_in("tensors", 0, "shape", [-1]), "has the shape"),
    (set_in("tensors", 0, "shape", [0]), "has the shape"),
    (set_in("tensors", 0, "kind", "int1"), "unknown kind"),
    (set_in("tensors", 0, "kind", "int9"), "unknown kind"),
    (set_in("tensors", 0, "shape", [True]), "has the shape"),
    (set_in("tensors", 0, "shape", 7), "not a valid artifact"),
    (set_in("tensors", 0, "kind", "object"), "unknown kind"),
    (set_in("tensors", 0, "kind", ["int5"]), "not a valid artifact"),
    (set_in("tensors", 0, "name", 3), "is not a text"),
    (set_in("tensors", {}), "do not fill its content"),
    (set_in("tensors", None), "not a valid artifact"),
    (lambda header: header["tensors"].pop(), "do not fill its content"),
    (lambda header: header["tensors"].append(header["tensors"][-1]), "occurs twice"),
    (set_in("tensors", 0, "columns", 1), "not a valid artifact|do not fill|fewer bytes|starts at"),
    (set_in("tensors", 0, "columns", "yes"), "has the columns 'yes'"),
    (set_in("model", "num_layers", "many"), "model.num_layers must be a whole number, not 'many'"),
    (set_in("model", "attention", "xsa", "no"), "model.attention.xsa must be true or false, not 'no'"),
    (set_in("model", "tied_embeddings", 1), "model.tied_embeddings must be true or false, not 1"),
    (set_in("model", "logit_softcap", float("inf")), "model.logit_softcap must be finite, not inf"),
    (set_in("model", "attention", "rope_base", float("nan")), "model.attention.rope_base must be finite, not nan"),
    (set_in("model", "attention", "window_pattern", ["S"]), "model.attention.window_pattern must be a text, not"),
    (lambda header: header["model"].pop("logit_softcap"), "model.logit_softcap is missing"),
    (lambda header: header["model"].pop("attention"), "model.attention.num_heads is missing"),
    (set_in("model", "attention", "num_kv_heads", 1), "the tensor '.*' has the shape .*, the model needs"),
    (set_in("model", "num_layers", 10**9), "num_layers must be between 2 and 1,000"),
    (set_in("model", "num_layers", 1000), "do not fit its model"),
    (set_in("model", "model_dim", 2**20), "do not fit its model"),
    (set_in("model", "evil", 1), "not a model config"),
    (set_in("tokenizer_sha256", 5), "its header lacks tokenizer_sha256, or it is invalid"),
]


@pytest.mark.parametrize(("change", "message"), FORGERIES)
def test_a_forged_header_is_refused(written, change, message: str):
    path, _, _ = written
    path.write_bytes(forged(path.read_bytes(), change))
    with pytest.raises(UserError, match=message):
        read_artifact(path).build()


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = np.array([np.nan], dtype=np.float32)
    monkeypatch.setattr(container, "_floats_of", lambda tensor: [])  # what keeps our own writer from it
    for tensor in (StoredTensor("float32", bad), StoredTensor("int5", np.ones((1, 2), dtype=np.int8), bad)):
        write_container(tmp_path / "a.zst", {}, {"bad": tensor})
        with pytest.raises(UserError, match="a.zst: is not a valid artifact .*'bad' holds a number that is not finite"):
            read_container(tmp_path / "a.zst")


def test_bytes_after_the_tensors_and_a_second_frame_are_refused(written):
    path, _, _ = written
    raw = path.read_bytes()
    path.write_bytes(forged(raw, lambda header: None, more=b"hidden"))
    with pytest.raises(UserError, match="do not fill its content"):
        read_artifact(path)
    path.write_bytes(container_of(raw[40:] + zstandard.compress(b"second")))
    with pytest.raises(UserError, match="not a valid artifact"):
        read_artifact(path)
    path.write_bytes(raw[:20])
    with pytest.raises(UserError, match="is truncated"):
        read_artifact(path)
    path.write_bytes(b"GOLFLM02" + raw[8:])
    with pytest.raises(UserError, match="has artifact version '02', but only 03 is known"):
        read_artifact(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_content_under_a_right_checksum_is_read_or_refused(written, tmp_path: Path, data: st.DataObject):
    """Flipped bytes never get past the checksum: this reaches the checks of the header and of the frame behind it."""
    path, _, _ = written
    content = bytearray(zstandard.ZstdDecompressor().decompress(path.read_bytes()[40:]))
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, 3000) | st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(content))
    (tmp_path / "fuzzed").write_bytes(container_of(frame))
    tracemalloc.start()
    try:
        with suppress(UserError):
            read_container(tmp_path / "fuzzed")
        assert tracemalloc.get_traced_memory()[1] < 3 * (MIN_CONTENT + MAX_RATIO * len(frame)) + 20 * MAX_HEADER
    finally:
        tracemalloc.stop()
    with suppress(UserError):
        read_artifact(tmp_path / "fuzzed").build()


def test_the_specification_is_enough_to_read_the_file(written):
    """A reader written from docs/artifact.md alone, with struct, json, numpy and zstandard."""
    path, _, _ = written
    raw = path.read_bytes()
    assert raw[:8] == b"GOLFLM03"
    assert raw[8:40] == hashlib.sha256(raw[40:]).digest()
    content = zstandard.ZstdDecompressor().decompress(raw[40:])
    (length,) = struct.unpack("<I", content[:4])
    header = json.loads(content[4 : 4 + length])
    payload = content[4 + length :]
    expected = read_artifact(path)
    assert header["model"] == expected.model.to_dict()
    for entry in header["tensors"]:
        count, at = int(np.prod(entry["shape"])), entry["offset"]
        width = {"float16": 2, "float32": 4}.get(entry["kind"])
        if width:
            planes = np.frombuffer(payload, np.uint8, count * width, at).reshape(width, count)
            values = planes.T.copy().view("<f2" if width == 2 else "<f4").ravel().astype(np.float32)
        else:
            rows = count // entry["shape"][-1]
            symbols = np.frombuffer(payload, np.int8, count, at).reshape(rows, -1)
            planes = np.frombuffer(payload, np.uint8, 2 * rows, at + count).reshape(2, rows)
            values = symbols * planes.T.copy().view("<f2").astype(np.float32)
        assert np.array_equal(values.reshape(entry["shape"]), expected.state[entry["name"]].numpy())


def test_the_reader_needs_neither_torch_nor_much_memory(tmp_path: Path):
    """20 million parameters: 80 MB in float32, and no more than 200 MB besides."""
    rng = np.random.default_rng(0)
    values = rng.integers(-16, 16, (5000, 4000), dtype=np.int8)
    write_container(tmp_path / "a.zst", {}, {"w": StoredTensor("int5", values, np.ones(5000, np.float16))})
    script = (
        "import resource, sys\n"
        "from trainer.quantize.container import read_container\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"floats = read_container({str(tmp_path / 'a.zst')!r})[1]['w'].floats()\n"
        "assert 'torch' not in sys.modules\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - floats.nbytes)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200e6


def test_both_files_count_and_over_the_cap_the_error_says_what_fits_or_that_is_stored(tmp_path: Path, capsys):
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in Transformer(TINY).state_dict().items()}
    quantization, names = QuantizationConfig(small_tensor=64, prune_above=100), ("artifact.zst", "train_gpt.py")
    arguments = state, TINY, quantization, "f" * 64, tmp_path, b"print()\n" * 500
    size = store(*arguments)
    assert size.code == 4000
    assert size.total == sum((tmp_path / name).stat().st_size for name in names)
    cap = size.total - 1
    with pytest.raises(UserError, match=r"1 bytes over the cap of [\d,]+; prune_frac 0.08 would fit") as refused:
        store(*arguments, cap=cap)
    assert (tmp_path / "artifact.zst").stat().st_size == size.model  # the requested one stays for inspection
    assert not (tmp_path / ".trial.zst").exists()
    promised = int(re.findall(r"would fit \(([\d,]+) bytes\)", str(refused.value))[0].replace(",", ""))
    fitted = store(*arguments, cap=cap, shrink_to_cap=True)
    assert fitted.total == promised == sum((tmp_path / name).stat().st_size for name in names)
    assert fitted.quantization == replace(quantization, prune_frac=0.08)
    assert "stored with prune_frac 0.08 instead" in capsys.readouterr().out
    fewer = store(*arguments, cap=fitted.total - 1, shrink_to_cap=True)
    assert fewer.quantization == replace(quantization, prune_frac=0.08, mlp_bits=4)
    with pytest.raises(UserError, match=r"and [\d,]+ with mlp_bits 3, .*, prune_frac 0.08; train a smaller model"):
        store(*arguments, cap=size.code, shrink_to_cap=True)


@pytest.fixture
def model() -> Transformer:
    """Random everywhere, so that every matrix has gradients."""
    torch.manual_seed(0)
    model = Transformer(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_export_calibrates_writes_reads_back_and_scores_the_stored_model(model: Transformer, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sequences = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(1))
    quantization = QuantizationConfig(rounding="loss_aware", quant_step=1e-3, codec="ans")
    events: list[str] = []
    scored: list[Transformer] = []

    @contextmanager
    def autocast() -> Iterator[None]:
        events.append("autocast on")
        yield
        events.append("autocast off")

    def batches() -> Iterator[torch.Tensor]:
        for batch in sequences.split(2):
            events.append("calibrated")
            yield batch

    def score(stored: Transformer) -> None:
        events.append(f"scored, with {sorted(path.name for path in tmp_path.iterdir())}")
        scored.append(stored)

    code = b"print()"
    exported = export(
        model, quantization, "f" * 64, tmp_path, code, sequences=batches(), autocast=autocast, score=score
    )
    files = "['artifact.zst', 'train_gpt.py']"
    assert events == ["autocast on", "calibrated", "calibrated", "autocast off", f"scored, with {files}"]
    assert exported is not None
    assert exported.size.model == (tmp_path / "artifact.zst").stat().st_size
    assert exported.size.code == len(code)
    assert exported.size.quantization == quantization
    assert exported.calibration_seconds > 0
    assert exported.export_seconds > 0
    assert (tmp_path / "train_gpt.py").read_bytes() == code
    artifact = read_artifact(tmp_path / "artifact.zst")
    assert (artifact.model, artifact.tokenizer_sha256) == (TINY, "f" * 64)
    rounded = LossAwareRounding(before, calibrate(model, sequences.split(2))).round(1e-3)
    (stored,) = scored
    assert stored is not model
    for name, tensor in stored.state_dict().items():
        expected = torch.from_numpy(rounded[name].floats()) if name in rounded else before[name].half().float()
        assert torch.equal(tensor, expected), name
        assert torch.equal(tensor, artifact.state[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_export_with_nearest_rounding_reads_no_text(model: Transformer, tmp_path: Path):
    def batches() -> Iterator[torch.Tensor]:
        raise AssertionError("read")
        yield

    scored: list[Transformer] = []
    quantization = QuantizationConfig(small_tensor=64, prune_frac=0.0)
    exported = export(model.double(), quantization, "f" * 64, tmp_path, b"", sequences=batches(), score=scored.append)
    assert exported is not None
    assert exported.calibration_seconds == 0
    (stored,) = scored
    assert {tensor.dtype for tensor in stored.state_dict().values()} == {torch.float64}  # the type of the given model
    symbols, scale = quantize_rows(model.bigram.table.weight, 6)
    assert torch.equal(stored.bigram.table.weight, (symbols.float() * scale.float()[:, None]).double())


def test_an_export_over_the_cap_is_not_scored(model: Transformer, tmp_path: Path):
    scored: list[Transformer] = []
    with pytest.raises(UserError, match="over the cap of 1,000"):
        export(model, QuantizationConfig(), "f" * 64, tmp_path, b"print()", cap=1000, score=scored.append)
    assert not scored
    assert (tmp_path / "artifact.zst").exists()  # for inspection


def test_the_ends_of_the_ranges_are_settings():
    config = QuantizationConfig(2, 8, 2, 8, prune_frac=0.0, small_tensor=0, prune_above=0, calibration_sequences=1)
    assert (config.mlp_bits, config.attention_bits, config.calibration_sequences) == (2, 8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other_bits": 9}, "bits must be between 2 and 8, not 9"),
        ({"prune_frac": -0.5}, r"prune_frac must be in \[0, 1\), not -0\.5"),
        ({"prune_frac": 1.5}, r"prune_frac must be in \[0, 1\), not 1\.5"),
        ({"quant_step": -1.0}, r"quant_step must be positive, not -1\.0"),
        ({"mlp_bits": 1}, "bits must be between 2 and 8, not 1"),
        ({"prune_frac": 1.0}, r"prune_frac must be in \[0, 1\), not 1\.0"),
        ({"quant_step": 0.0}, r"quant_step must be positive, not 0\.0"),
        ({"calibration_sequences": 0}, "calibration_sequences must be at least 1, not 0"),
        ({"small_tensor": -1}, "small_tensor must be at least 0, not -1"),
        ({"prune_above": -1}, "prune_above must be at least 0, not -1"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**options)
