"""The checkpoint file against zipfile and hashlib, and everything that is refused about it."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from trainer import checkpoint as module
from trainer.checkpoint import (
    averaged_state,
    live_state,
    load_checkpoint,
    read_progress,
    save_checkpoint,
    stored_average,
    verify_checksum,
)
from trainer.errors import UserError

CONTENT = {
    "state_dict": {"model.w": torch.arange(400_000.0), "other": torch.zeros(1)},
    "global_step": 12,
    "golf_trainer": {"saved_at": 34.5},
    "callbacks": {"WeightAveraging": {"method": "late_swa", "count": 2, "weights": {"w": torch.tensor([4.0, 6.0])}}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(CONTENT, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_the_archive_comment_is_the_sha256_of_all_bytes_before_it(path: Path):
    raw = path.read_bytes()
    comment = zipfile.ZipFile(path).comment
    assert comment == b"sha256:" + hashlib.sha256(raw[: -len(comment)]).hexdigest().encode()
    assert verify_checksum(path) is None
    for loaded in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["model.w"], torch.arange(400_000.0))
        assert loaded["global_step"] == 12


def test_steps_and_weights_are_read(path: Path):
    assert read_progress(path) == (12, 34.5)
    assert read_progress(path.with_name("nothing")) == (-1, 0.0)
    loaded = load_checkpoint(path)
    assert list(live_state(loaded)) == ["w"]
    assert stored_average(loaded)["w"].tolist() == [2.0, 3.0]
    assert stored_average({"callbacks": {}}) is None
    assert stored_average({}) is None
    ema = {"method": "ema", "count": 2, "weights": {"w": torch.tensor([4.0])}}
    assert averaged_state(ema)["w"].tolist() == [4.0]
    assert averaged_state({**ema, "count": 1}) is None


def test_a_checksum_of_nothing_is_right_too(tmp_path: Path):
    (tmp_path / "empty").write_bytes(b"sha256:" + hashlib.sha256(b"").hexdigest().encode())
    assert verify_checksum(tmp_path / "empty") is None


def test_any_damage_is_found(path: Path):
    raw = path.read_bytes()
    assert len(raw) > 2**20  # more than one block of the checksum
    for position in (0, 5, 2**20 - 1, 2**20, len(raw) - 80, len(raw) - 64, len(raw) - 1):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(
            UserError, match=r"a\.ckpt: is damaged \(its checksum does not match\); resume from another"
        ):
            load_checkpoint(path)
    for damaged in (raw[:-1], raw[: len(raw) // 2], raw + b"x", b"", b"PK", raw[:70]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged .no checksum at its end: it was truncated"):
            load_checkpoint(path)
    path.unlink()
    assert verify_checksum(path) == "No such file or directory"


def test_what_is_no_checkpoint_is_refused(path: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is a folder; give a file in it"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there is no such checkpoint"):
        load_checkpoint(tmp_path / "nothing")
    for foreign in ([1, 2], {"state_dict": {}}, {"golf_trainer": 3}):
        save_checkpoint(foreign, path)
        with pytest.raises(UserError, match="was not written by this trainer"):
            load_checkpoint(path)
    save_checkpoint({"golf_trainer": {}, "code": pickle.Pickler}, path)
    with pytest.raises(UserError, match="cannot be read safely: it holds more than tensors and plain values"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"no checkpoint")
    with path.open("r+b") as file:
        module.append_checksum(file)
    with pytest.raises(UserError, match="is not a checkpoint that can be read"):
        load_checkpoint(path)
    path.write_bytes(bytes(100))
    with path.open("r+b") as file, pytest.raises(RuntimeError, match="no plain zip file"):
        module.append_checksum(file)


def test_an_error_that_is_no_failed_write_stays_what_it_is(path: Path, monkeypatch: pytest.MonkeyPatch):
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        save_checkpoint(CONTENT, path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.ckpt"]
