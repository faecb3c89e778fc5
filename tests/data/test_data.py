"""Shards, stream, tokenizer and byte table against plain Python and numpy."""

import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.normalization import NormalizationSample
from trainer.data.prefetch import Prefetcher
from trainer.data.python_documentation import docstrings_of
from trainer.data.shards import TokenFiles, open_shard, write_shard
from trainer.data.sources import LocalText, PythonDocumentation, Shards
from trainer.data.stream import TrainStream
from trainer.data.tokenizer import ByteTable, load_tokenizer
from trainer.errors import UserError


def test_a_shard_is_a_256_int_header_and_uint16(tmp_path: Path):
    write_shard(tmp_path / "a.bin", np.array([1, 2, 65535], dtype=np.uint16))
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == 1024 + 6
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 3]
    assert np.frombuffer(raw[1024:], "<u2").tolist() == [1, 2, 65535]
    assert open_shard(tmp_path / "a.bin").tolist() == [1, 2, 65535]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-2], "header promises 3 tokens"),
        (lambda raw: raw + b"\0", "header promises 3 tokens"),
        (lambda raw: b"\0" * 4 + raw[4:], "not a token shard"),
        (lambda raw: raw[:100], "not a token shard"),
        (lambda raw: b"", "not a token shard"),
        (lambda raw: raw[:4] + b"\x02\0\0\0" + raw[8:], "shard version 2"),
        (lambda raw: raw[:8] + b"\0" * 4 + raw[12:1024], "holds no tokens"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, change, message: str):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2, 3], dtype=np.uint16))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        open_shard(path)
    assert "a.bin" in str(caught.value)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenFiles, np.ndarray]:
    folder = tmp_path_factory.mktemp("three")
    row = np.random.default_rng(0).integers(0, 2**16, 1000).astype(np.uint16)
    for name, part in zip("abc", np.split(row, [13, 600]), strict=True):
        write_shard(folder / f"{name}.bin", part)
    return TokenFiles(sorted(folder.glob("*.bin"))), row


@given(start=st.integers(0, 5000), count=st.integers(0, 2500))
def test_reading_wraps_around_the_concatenation(three_shards, start: int, count: int):
    files, row = three_shards
    assert np.array_equal(files.read(start, count), row[(start + np.arange(count)) % 1000])


@given(world=st.sampled_from([1, 2, 4]), step=st.integers(0, 50), length=st.sampled_from([7, 8]))
def test_the_processes_of_a_step_read_the_next_tokens_of_the_stream(three_shards, world: int, step: int, length: int):
    files, row = three_shards
    batch = 12 * length
    parts = torch.cat([TrainStream(files, batch, length, 100, rank, world)[step] for rank in range(world)]).numpy()
    first = batch * step + length * np.arange(12)[:, None]
    # a row's last target is the next row's first token
    assert np.array_equal(parts, row[(first + np.arange(length + 1)) % 1000])


@settings(deadline=None)
@given(world=st.sampled_from([1, 2, 4]), seed=st.integers(0, 5), restart=st.integers(0, 40))
def test_every_sequence_comes_once_per_epoch_in_another_order_each_time(three_shards, world, seed, restart):
    """1,000 tokens hold 124 sequences of 8 with their targets: 8 per step, so an epoch ends inside a step."""
    files, row = three_shards
    sequences = {row[8 * index : 8 * index + 9].tobytes() for index in range(124)}

    def read(steps: range) -> list[bytes]:
        streams = [TrainStream(files, 64, 8, 100, rank, world, "shuffled", seed) for rank in range(world)]
        return [sequence.numpy().astype(np.uint16).tobytes() for n in steps for s in streams for sequence in s[n]]

    whole = read(range(31))
    assert set(whole[:124]) == set(whole[124:]) == sequences
    assert whole[:124] != whole[124:]
    assert read(range(restart, 41))[: 8 * max(0, 31 - restart)] == whole[8 * restart :]


def test_a_thread_reads_ahead_from_the_first_step_that_is_not_done(three_shards):
    stream = TrainStream(three_shards[0], 64, 8, 20)
    loader = Prefetcher(stream, lambda: 7, depth=3)
    assert len(loader) == 20
    assert [batch.tolist() for batch in loader] == [stream[step].tolist() for step in range(7, 20)]
    batches = iter(loader)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_of_the_reading_thread_ends_the_run(three_shards, monkeypatch: pytest.MonkeyPatch):
    stream = TrainStream(three_shards[0], 64, 8, 20)
    monkeypatch.setattr(stream.files, "read", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(Prefetcher(stream, lambda: 0)))


def test_a_batch_that_does_not_fit_is_refused(three_shards):
    files, _ = three_shards
    with pytest.raises(UserError, match="not a multiple"):
        TrainStream(files, 100, 8, 10)
    with pytest.raises(UserError, match=r"batch_tokens 24 .* data.sequence_length 8 times 2 processes \(16\)"):
        TrainStream(files, 24, 8, 10, world_size=2)
    for tokens in (8000, 1000):  # the last token is a target only
        with pytest.raises(UserError, match=r"more than the training tokens give \(1,000\)"):
            TrainStream(files, tokens, 8, 10)
    assert len(TrainStream(files, 999, 9, 10)) == 10
    for options in ({"batch_tokens": 0}, {"sequence_length": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(options))} must be at least"):
            TrainStream(files, **{"batch_tokens": 8, "sequence_length": 8, "num_steps": 10, **options})


def test_the_smallest_batch_the_defaults_and_every_whole_sequence(three_shards):
    files, row = three_shards
    assert TrainStream(files, 1, 1, 10)[3].tolist() == [row[3:5].tolist()]
    shuffled = TrainStream(files, 9, 9, 200, order="shuffled")
    assert torch.equal(shuffled[5], TrainStream(files, 9, 9, 200, 0, 1, "shuffled", 0)[5])
    epoch = {shuffled[step].numpy().astype(np.uint16).tobytes() for step in range(111)}
    assert epoch == {row[9 * index : 9 * index + 10].tobytes() for index in range(111)}  # 999 targets
    assert TrainStream(files, 7, 7, 200, order="shuffled")[0].shape == (1, 8)


# GOLF_TOKENIZERS names a folder with further .model files, such as the challenge's own.
REAL_TOKENIZERS = sorted(Path(os.environ["GOLF_TOKENIZERS"]).glob("*.model")) if "GOLF_TOKENIZERS" in os.environ else []


@pytest.mark.parametrize("model", [None, *REAL_TOKENIZERS], ids=lambda path: path.stem if path else "trained here")
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.text("aé漢🙂 \t\u00a0\u200d\u0301\u0007▁09", max_size=60))
@example(text="")
@example(text="  two  spaces\u00a0and\u3000wide ones   ")
@example(text="👩‍👩‍👧 e\u0301 é ﬁ … \x00\x07\t\r\n")
def test_the_byte_table_counts_the_bytes_of_the_normalized_text(shard_folder: Path, model: Path | None, text: str):
    tokenizer = load_tokenizer(model or shard_folder / "tokenizer.model")
    table = ByteTable.from_tokenizer(tokenizer)
    ids = torch.tensor([1, *tokenizer.encode(text)])
    expected = len(tokenizer.normalize(text).replace("\u2581", " ").encode())
    assert int(table.count(ids[:-1], ids[1:]).sum()) == expected


def test_the_description_names_what_normalization_replaces(shard_folder: Path):
    sample = NormalizationSample(load_tokenizer(shard_folder / "tokenizer.model"))
    for text in ("plain words", "no\u00a0break\u00a0space", "three dots…", "e\u0301"):
        sample.add(text)
    assert sample.describe() == (
        "normalization changed 3 of the first 4 documents (43 bytes became 40); "
        "U+00A0 NO-BREAK SPACE to ' ' 2 times, U+2026 … to '...' 1 times"
    )


def test_control_tokens_count_no_byte_and_byte_tokens_one(shard_folder: Path):
    tokenizer = load_tokenizer(shard_folder / "tokenizer.model")
    table = ByteTable.from_tokenizer(tokenizer)
    assert table.text_bytes[:4].tolist() == [0, 0, 0, 0]
    byte = tokenizer.piece_to_id("<0xF0>")
    assert int(table.count(torch.tensor([5]), torch.tensor([byte]))) == 1


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 299), min_size=1, max_size=50), chunk=st.integers(1, 60))
def test_the_bytes_of_a_row_are_the_sum_of_its_targets(shard_folder: Path, tokens: list[int], chunk: int):
    table = ByteTable.from_tokenizer(load_tokenizer(shard_folder / "tokenizer.model"))
    ids = torch.tensor(tokens)
    expected = int(table.count(ids[:-1], ids[1:]).sum())
    assert table.total(np.array(tokens, dtype=np.uint16), chunk) == expected


def test_local_text_keeps_documents_in_order_with_bos_and_is_made_once(tmp_path: Path, shard_folder: Path, capsys):
    documents = ["the model reads", "12 cats", "another token"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "v.txt").write_text("warm stones")
    model = str(shard_folder / "tokenizer.model")
    source = LocalText(
        [str(tmp_path / "a.jsonl.zst")], str(tmp_path / "out"), [str(tmp_path / "v.txt")], tokenizer=model
    )
    source.prepare()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tokenizing 2 files (0.0 MB) into {tmp_path / 'out'}"
    assert any(re.fullmatch(r"tokenized 0\.0 MB in \d+\.\d s \(\d+\.\d MB/s\)", line) for line in lines)
    text = source.prepared()
    tokens = open_shard(text.train[0])
    tokenizer = load_tokenizer(text.tokenizer)
    parts = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
    assert [tokenizer.decode(part[1:].tolist()) for part in parts] == documents
    before = text.train[0].stat().st_mtime_ns
    source.prepare()
    assert text.train[0].stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_a_folder_with_foreign_shards_is_never_cleared(tmp_path: Path):
    write_shard(tmp_path / "x_train_000000.bin", np.array([1, 2], dtype=np.uint16))
    (tmp_path / "a.txt").write_text("some text")
    source = LocalText([str(tmp_path / "a.txt")], str(tmp_path), [str(tmp_path / "a.txt")], vocab_size=300)
    with pytest.raises(UserError, match="this trainer did not make"):
        source.prepare()
    assert (tmp_path / "x_train_000000.bin").exists()


def test_python_documentation_finds_docstrings_and_splits_them_by_hash(tmp_path: Path):
    root = tmp_path / "lib"
    root.mkdir()
    for index in range(60):
        text = " ".join(f"word{index}{letter} about the number {index * 7}" for letter in "abcdefghijklmnop")
        (root / f"m{index}.py").write_text(f'"""Module {index}.\n\n{text}\n"""\n\ndef f():\n    """Return {text}."""\n')
    (root / "broken.py").write_text('"""never closed')
    source = PythonDocumentation(str(tmp_path / "out"), vocab_size=320, val_every=4, roots=[str(root)])
    source.prepare()
    text = source.prepared()
    tokenizer = load_tokenizer(text.tokenizer)
    documents = []
    for path in (text.train[0], text.val[0]):
        tokens = open_shard(path)
        documents.append({tokenizer.decode(p[1:].tolist()) for p in np.split(tokens, np.flatnonzero(tokens == 1))[1:]})
    assert len(documents[0]) + len(documents[1]) == 60
    assert not documents[0] & documents[1]
    assert len(docstrings_of(root / "m3.py")) == 2


def test_missing_data_is_named(tmp_path: Path):
    (tmp_path / "artifact.zst").touch()
    for name in ("none", "artifact.zst"):
        with pytest.raises(UserError, match=f"{name}: is not a folder"):
            Shards(str(tmp_path / name)).prepared()
    with pytest.raises(UserError, match=r"no shard named \*_train_"):
        Shards(str(tmp_path)).prepared()
    with pytest.raises(UserError, match="no such text file"):
        LocalText([str(tmp_path / "none.txt")], str(tmp_path / "o")).prepare()
