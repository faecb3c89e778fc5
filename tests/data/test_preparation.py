"""A folder of shards is replaced only if it is ours, whole, and by one process at a time; what identifies a text."""

import json
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_documents
from trainer import lock
from trainer.data.identity import difference, identify
from trainer.data.manifest import Manifest, documents_of, verify
from trainer.data.normalization import DocumentKeys
from trainer.data.shards import open_shard, write_shard
from trainer.data.sources import LocalText, PreparedText
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def source(tmp_path: Path, shard_folder: Path) -> LocalText:
    """Sixty documents, to be prepared into the folder `o`."""
    texts = write_texts(tmp_path / "a.jsonl", make_documents(60, 3))
    return LocalText([texts], str(tmp_path / "o"), val_every=4, tokenizer=str(shard_folder / "tokenizer.model"))


@pytest.mark.parametrize(
    "name", ["notes.txt", "fineweb_train_000000.bin", "tokenizer.model", "manifest.json", "sub/x_val_000000.bin"]
)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_folder_with_anything_foreign_is_refused_and_kept(name: str, is_prepared: bool, source: LocalText):
    if is_prepared:
        source.prepare()
        source.val_every = 3
    path = source.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"datasets": []}')  # a manifest of somebody else, or any file
    before = {each: each.read_bytes() for each in source.folder.rglob("*") if each.is_file()}
    with pytest.raises(UserError, match="which this trainer did not make; choose another data.source.folder"):
        source.prepare()
    assert {each: each.read_bytes() for each in source.folder.rglob("*") if each.is_file()} == before
    assert [each.name for each in source.folder.parent.glob(".*")] == []


def test_an_empty_folder_and_one_of_ours_are_replaced(source: LocalText):
    source.folder.mkdir()
    source.prepare()
    first = verify(source.folder)
    source.val_every = 3
    source.prepare()
    assert verify(source.folder).source != first.source
    assert [each.name for each in source.folder.parent.glob(".*")] == []


def test_a_failed_preparation_leaves_the_old_shards_whole(source: LocalText, tmp_path: Path):
    source.prepare()
    before = {path.name: path.read_bytes() for path in source.folder.iterdir()}
    (tmp_path / "a.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        source.prepare()
    assert {path.name: path.read_bytes() for path in source.folder.iterdir()} == before
    assert [each.name for each in tmp_path.glob(".*")] == []


def test_a_run_that_resumes_keeps_its_shards_when_a_file_has_changed(source: LocalText, tmp_path: Path, capsys):
    source.prepare(only_if_missing=True)
    before = {path.name: path.read_bytes() for path in source.folder.iterdir()}
    write_texts(tmp_path / "a.jsonl", make_documents(70, 4))
    source.prepare(only_if_missing=True)
    assert {path.name: path.read_bytes() for path in source.folder.iterdir()} == before
    assert "have changed since it was prepared; its shards are used as they are" in capsys.readouterr().out
    (tmp_path / "a.jsonl").unlink()
    source.prepare(only_if_missing=True)
    with pytest.raises(UserError, match=f"use --data.source Shards --data.source.folder {source.folder}"):
        source.prepare()


def test_two_at_once_make_it_once(source: LocalText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    made: list[Path] = []
    original = LocalText._make

    def make(self: LocalText, folder: Path, *rest: object) -> None:
        made.append(folder)
        time.sleep(1.5)
        original(self, folder, *rest)

    monkeypatch.setattr(LocalText, "_make", make)
    threads = [threading.Thread(target=source.prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert "waiting for another process that does it" in capsys.readouterr().out
    assert sum(shard.documents for shard in verify(source.folder).shards) == 60


@pytest.mark.parametrize("owner", ["dead", "silent"])
def test_the_lock_of_a_dead_process_is_taken_over(owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    (tmp_path / "lock").mkdir()
    host = socket.gethostname() if owner == "dead" else "another"
    (tmp_path / "lock" / lock.OWNER).write_text(json.dumps({"host": host, "pid": pid}))
    monkeypatch.setattr(lock, "STALE", 1.0 if owner == "silent" else 1e9)
    with lock.exclusive(tmp_path / "lock", "a test"):
        assert json.loads((tmp_path / "lock" / lock.OWNER).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_living_lock_is_respected_however_long_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lock, "STALE", 0.8)
    order: list[str] = []

    def hold() -> None:
        with lock.exclusive(tmp_path / "lock", "a test"):
            order.append("in")
            time.sleep(2.0)
            order.append("out")

    first = threading.Thread(target=hold)
    first.start()
    time.sleep(0.3)
    hold()
    first.join()
    assert order == ["in", "out", "in", "out"]


def test_a_lock_that_another_process_took_over_first_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The owner has died. Between a look at its lock and the takeover, a faster process takes it over."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lock, "POLL", 0.05)
    path, rename, faster = tmp_path / "lock", os.rename, ExitStack()
    path.mkdir()
    dead = {"host": socket.gethostname(), "pid": 2**22 + 1}
    (path / lock.OWNER).write_text(json.dumps(dead))

    def late_rename(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        faster.enter_context(lock.exclusive(path, "a test"))
        rename(old, new)

    monkeypatch.setattr(os, "rename", late_rename)
    with faster:
        with pytest.raises(UserError, match="another process does that now"), lock.exclusive(path, "late", waits=False):
            raise AssertionError("two hold the lock")
        assert lock.is_held(path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_taken_over_is_not_removed_by_its_first_owner(tmp_path: Path):
    path = tmp_path / "lock"
    with lock.exclusive(path, "a test"):
        (path / lock.OWNER).write_text("another owner")
    assert (path / lock.OWNER).read_text() == "another owner"


NEAR = ["The Model reads", "the model  reads", "the model reads\r\n", " the\tmodel reads ", "the model reads\u00a0"]


@pytest.mark.parametrize("val_every", [2, 3, 5])
def test_near_copies_of_a_document_are_in_one_split(val_every: int, tmp_path: Path, shard_folder: Path):
    texts = [variant for text in make_documents(20, 2) for variant in (text, text.upper(), f" {text}\r\n", text + " ")]
    name = write_texts(tmp_path / "a.jsonl", NEAR + texts)
    model = str(shard_folder / "tokenizer.model")
    LocalText([name], str(tmp_path / "o"), val_every=val_every, tokenizer=model).prepare()
    verify(tmp_path / "o")
    tokenizer, splits = load_tokenizer(model), []
    for shard in Manifest.read(tmp_path / "o").shards:
        documents = documents_of(open_shard(tmp_path / "o" / shard.file))
        splits.append({" ".join(tokenizer.decode(each.tolist()).casefold().split()) for each in documents})
    assert len(splits) == 2
    assert not splits[0] & splits[1]


def test_near_copies_of_validation_documents_are_dropped_and_counted(tmp_path: Path, shard_folder: Path, capsys):
    train = write_texts(tmp_path / "t.jsonl", [*NEAR, *make_documents(10, 1)])
    val = write_texts(tmp_path / "v.jsonl", ["the model reads"])
    source = LocalText([train], str(tmp_path / "o"), [val], tokenizer=str(shard_folder / "tokenizer.model"))
    source.prepare()
    assert verify(tmp_path / "o").dropped == len(NEAR)
    assert f"left out {len(NEAR)} training documents that the validation split has" in capsys.readouterr().out


@pytest.mark.parametrize("has_val_files", [False, True])
def test_the_tokenizer_is_trained_on_training_documents_alone(has_val_files: bool, tmp_path: Path):
    """Each document has a letter of its own: a tokenizer that saw it has a token for it."""
    letters = [chr(0x4E00 + index) for index in range(40)]
    texts = [f"{letter} the model reads {letter * 30}" for letter in letters]
    train = write_texts(tmp_path / "t.jsonl", texts)
    val = [write_texts(tmp_path / "v.jsonl", [text.upper() for text in texts[:10]])] if has_val_files else None
    source = LocalText([train], str(tmp_path / "o"), val, val_every=4, vocab_size=320)
    source.prepare()
    keys, tokenizer = DocumentKeys(), load_tokenizer(source.prepared().tokenizer)
    manifest = verify(source.folder)
    counts = {split: sum(shard.documents for shard in manifest.of(split)) for split in ("train", "val")}
    if has_val_files:
        held_out = letters[:10]
        assert counts == {"train": 30, "val": 10}
    else:
        held_out = [a for a, b in zip(letters, texts, strict=True) if int.from_bytes(keys.of(b)[:8]) % 4 == 0]
        assert counts == {"train": 40 - len(held_out), "val": len(held_out)}
    known = [letter for letter in letters if not tokenizer.is_unknown(tokenizer.piece_to_id(letter))]
    assert not set(known) & set(held_out)
    assert known


def test_the_fingerprint_tells_texts_apart_and_not_tokenizers_or_names(tmp_path: Path, shard_folder: Path):
    def fingerprint(name: str, texts: list[str], tokenizer: str | None) -> str:
        path = write_texts(tmp_path / f"{name}.jsonl", texts)
        source = LocalText(
            [path], str(tmp_path / name), val_every=4, tokenizer=tokenizer, vocab_size=None if tokenizer else 285
        )
        source.prepare()
        return verify(source.folder).text_fingerprint

    texts = make_documents(60, 3)
    model = str(shard_folder / "tokenizer.model")
    swapped = [text.translate(str.maketrans("ae", "ea")) for text in texts]  # equal in documents and bytes
    assert fingerprint("a", texts, model) == fingerprint("b", texts, None)
    assert fingerprint("a", texts, model) != fingerprint("c", swapped, model)
    assert fingerprint("a", texts, model) != fingerprint("d", texts[::-1], model)


def test_shards_are_known_by_name_length_and_content(tmp_path: Path):
    def shards(**tokens: list[int]) -> PreparedText:
        for name, values in tokens.items():
            write_shard(tmp_path / f"{name}.bin", np.array(values, dtype=np.uint16))
        paths = [tmp_path / f"{name}.bin" for name in tokens]
        return PreparedText(paths[:-1], paths[-1:], tmp_path / "tokenizer.model")

    before = identify(shards(a=[1, 2], b=[1, 3], v=[1, 4]))
    stored = json.loads(json.dumps(before))  # tuples become lists, as in other files
    assert difference(stored, identify(shards(a=[1, 2], b=[1, 3], v=[1, 4]))) is None
    now: dict[str, list[int]]
    for now, message in (
        ({"a": [1, 2], "v": [1, 4]}, "train shards differ: b.bin is missing"),
        ({"a": [1, 2], "b": [1, 3], "c": [1, 5], "v": [1, 4]}, "train shards differ: c.bin is new"),
        ({"a": [1, 2], "b": [1, 9], "v": [1, 4]}, "train shard b.bin has another content"),
        ({"b": [1, 3], "a": [1, 2], "v": [1, 4]}, "train shard a.bin has another content"),
        ({"a": [1, 2], "b": [1, 3], "v": [1, 4, 4]}, "val shard v.bin has another content"),
    ):
        assert difference(stored, identify(shards(**now))) == f"the {message}"
    with pytest.raises(UserError, match="is the validation shard .*v.bin, too"):
        identify(shards(a=[1, 2], b=[1, 4], v=[1, 4]))
