"""What the data module refuses before the first step."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.data.manifest import Manifest, ShardRecord
from trainer.data.shards import write_shard
from trainer.data.sources import Shards
from trainer.datamodule import TokenData
from trainer.errors import UserError
from trainer.evaluation.windows import EvaluationConfig
from trainer.files import sha256_of


def data(folder: Path) -> TokenData:
    return TokenData(Shards(str(folder)), 256, 32, vocab_size=300, evaluation=EvaluationConfig(32, 8, 16))


@pytest.fixture
def copied(shard_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_folder, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["words_train_000001.bin", "words_val_000000.bin"])
def test_a_token_beyond_the_vocabulary_is_found_before_training(copied: Path, name: str):
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 1, "") for path in copied.glob("*.bin")]
    Manifest({}, sha256_of(copied / "tokenizer.model"), shards, {}).write(copied)  # of the shards as they were
    data(copied).setup("fit")
    write_shard(copied / name, np.array([1] + [7] * 5_000 + [300], dtype=np.uint16))
    with pytest.raises(UserError, match=rf"{name}: holds token 300, but the tokenizer has only 300 pieces"):
        data(copied).setup("fit")


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_shards_that_the_manifest_does_not_know_are_refused(change: str, copied: Path):
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 1, "") for path in copied.glob("*.bin")]
    Manifest({}, sha256_of(copied / "tokenizer.model"), shards, {}).write(copied)
    data(copied).setup("fit")
    if change == "one more":
        shutil.copyfile(copied / "words_train_000000.bin", copied / "other_train_000000.bin")
    else:
        (copied / "words_train_000001.bin").unlink()
    said = {"one more": "other_train_000000.bin: the folder's", "one less": "words_train_000001.bin: is gone"}
    with pytest.raises(UserError, match=said[change]):
        data(copied).setup("fit")


def test_learning_while_scoring_is_refused_while_training(shard_folder: Path):
    module, same = data(shard_folder), data(shard_folder)
    module.evaluation = same.evaluation = EvaluationConfig(32, 8, 16, adapt_rate=0.1)
    module.setup("validate")
    with pytest.raises(UserError, match=r"eval\.adapt_rate belongs to trainer validate"):
        same.setup("fit")


def test_fewer_windows_than_processes_are_refused(shard_folder: Path):
    module = data(shard_folder)
    module.evaluation = EvaluationConfig(32, 0, 16, fit_tokens=96)
    module.setup("fit")
    module.trainer = SimpleNamespace(world_size=3, global_rank=1, state=SimpleNamespace(fn="fit"))
    assert len(module.val_dataloader()[0].dataset) == 1
    module.trainer.world_size = 4
    with pytest.raises(UserError, match="96 validation targets make 3 windows of 32, fewer than 4 processes"):
        module.val_dataloader()


def test_another_tokenizer_than_the_manifests_is_refused(copied: Path):
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 1, "") for path in copied.glob("*.bin")]
    Manifest({}, "0" * 64, shards, {}).write(copied)
    with pytest.raises(UserError, match="is not the tokenizer that made the shards"):
        data(copied).setup("fit")


def test_calibration_takes_fewer_sequences_at_once_where_pieces_are_many(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    module = data(shard_folder)
    module.setup("fit")
    usual = list(module.calibration_batches(12, torch.device("cpu")))
    monkeypatch.setattr("trainer.datamodule.CALIBRATION_LOGITS", 3 * 32 * 300)
    small = list(module.calibration_batches(12, torch.device("cpu")))
    assert max(len(rows) for rows in usual) == 8
    assert max(len(rows) for rows in small) == 3
    assert torch.equal(torch.cat(small), torch.cat(usual))
