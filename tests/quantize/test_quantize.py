"""The quantiser against numpy bit by bit; the artifact against its own promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.conftest import TINY
from trainer.errors import UserError
from trainer.model.transformer import Transformer, TransformerConfig
from trainer.quantize.artifact import read_artifact, write_artifact
from trainer.quantize.export import export
from trainer.quantize.intn import dequantize_rows, prune_smallest, quantize_rows
from trainer.quantize.policy import QuantizationConfig, kind_of

FLOATS = st.floats(-(2.0**12), 2.0**12, width=32)


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=FLOATS),
    st.sampled_from([5, 6, 8]),
)
def test_quantised_rows_equal_numpy_bit_by_bit(w: np.ndarray, bits: int):
    clip = 2 ** (bits - 1) - 1
    scale = np.maximum(np.maximum(np.abs(w).max(1) / np.float32(clip), np.float32(1e-12)), np.float32(2**-14))
    scale = scale.astype(np.float16)
    expected = np.clip(np.rint(w / scale.astype(np.float32)[:, None]), -clip - 1, clip).astype(np.int8)
    symbols, scales = quantize_rows(torch.from_numpy(w), bits)
    assert np.array_equal(symbols.numpy(), expected)
    assert np.array_equal(scales.numpy(), scale)
    back = dequantize_rows(symbols, scales).numpy()
    # half a step, and what the clamp takes when float16 rounded the scale down
    step = scale.astype(np.float32)[:, None]
    assert (np.abs(back - w) <= step * (0.5 + clip * 2.0**-11) * 1.0001).all()
    assert not back[~w.any(axis=1)].any()


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
    kinds = {name: kind_of(name, tensor, config, QuantizationConfig()) for name, tensor in model.state_dict().items()}
    assert kinds["token_embedding.weight"] == "float16"
    assert kinds["bigram.table.weight"] == kinds["bigram.proj.weight"] == "int6"
    assert [block for block in range(10) if kinds[f"blocks.{block}.attention.k.weight"] == "float16"] == [8]
    assert {kinds[f"blocks.{block}.mlp.{part}.weight"] for block in range(10) for part in ("up", "down")} == {"int5"}
    assert {kinds[f"blocks.{block}.attention.q.weight"] for block in range(10)} == {"int6"}
    assert kinds["skip_weights"] == kinds["blocks.3.mix"] == kinds["smear.gate"] == "float16"


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in Transformer(TINY).state_dict().items()}
    config = QuantizationConfig(small_tensor=63)  # so that a mix of 2 x 32 is a "larger control vector"
    kinds = {name: kind_of(name, tensor, TINY, config) for name, tensor in state.items()}
    size = write_artifact(tmp_path / "a.zst", TINY, state, kinds, "f" * 64)
    assert size == (tmp_path / "a.zst").stat().st_size
    return tmp_path / "a.zst", state, kinds


def test_an_artifact_gives_back_the_rounded_weights(written):
    path, state, kinds = written
    artifact = read_artifact(path)
    assert artifact.model == TINY
    assert artifact.tokenizer_sha256 == "f" * 64
    assert {"int5", "int6", "float16", "float32"} <= set(kinds.values())
    for name, tensor in state.items():
        kind = kinds[name]
        if kind.startswith("int"):
            expected = dequantize_rows(*quantize_rows(tensor, int(kind[3:])))
        else:
            expected = tensor.half().float() if kind == "float16" else tensor
        assert torch.equal(artifact.state[name], expected)
    artifact.build()


def test_equal_weights_give_equal_bytes(written, tmp_path: Path):
    path, state, kinds = written
    write_artifact(tmp_path / "b.zst", TINY, dict(reversed(state.items())), kinds, "f" * 64)
    assert (tmp_path / "b.zst").read_bytes() == path.read_bytes()


def test_any_damage_is_refused(written):
    path, _, _ = written
    raw = path.read_bytes()
    for position in range(0, len(raw), 97):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(UserError):
            read_artifact(path)
    for damaged in (raw[:-1], raw[: len(raw) // 2], b"", raw + b"x", raw + raw[40:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            read_artifact(path)


def test_a_frame_that_promises_too_much_is_refused_unread(written):
    import hashlib

    path, _, _ = written
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(2**20))
    at = bomb.index((2**20).to_bytes(4, "little"))
    bomb = bomb[:at] + (2**31).to_bytes(4, "little") + bomb[at + 4 :]
    path.write_bytes(b"GOLFLM01" + hashlib.sha256(bomb).digest() + bomb)
    with pytest.raises(UserError, match="not between"):
        read_artifact(path)


def test_export_counts_both_files_and_fails_over_the_cap(tmp_path: Path):
    torch.manual_seed(0)
    state = Transformer(TINY).state_dict()
    size = export(state, TINY, QuantizationConfig(), "f" * 64, tmp_path)
    on_disk = sum((tmp_path / name).stat().st_size for name in ("artifact.zst", "train_gpt.py"))
    assert size.total == on_disk
    with pytest.raises(UserError, match="1 bytes over the cap"):
        export(state, TINY, QuantizationConfig(), "f" * 64, tmp_path, cap=size.total - 1)
