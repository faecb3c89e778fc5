"""What the data module refuses before the first step."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.data.calibration import calibration_sequences
from trainer.data.local_text import LocalText
from trainer.data.manifest import TOKENIZER, Manifest, ShardRecord
from trainer.data.python_documentation import PythonDocumentation
from trainer.data.shards import TokenFiles, write_shard
from trainer.data.sources import Shards
from trainer.data.stream import TrainStream
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
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 1, path.name) for path in copied.glob("*.bin")]
    Manifest({}, sha256_of(copied / "tokenizer.model"), shards, {}, 0, {}).write(copied)  # of the shards as they were
    data(copied).setup("fit")
    write_shard(copied / name, np.array([1] + [7] * 5_000 + [300], dtype=np.uint16))
    with pytest.raises(UserError, match=rf"{name}: holds token 300, but the tokenizer's vocabulary size is 300"):
        data(copied).setup("fit")


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_shards_that_differ_from_the_manifest_are_refused(change: str, copied: Path):
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 1, path.name) for path in copied.glob("*.bin")]
    Manifest({}, sha256_of(copied / "tokenizer.model"), shards, {}, 0, {}).write(copied)
    data(copied).setup("fit")
    if change == "one more":
        shutil.copyfile(copied / "words_train_000000.bin", copied / "other_train_000000.bin")
    else:
        (copied / "words_train_000001.bin").unlink()
    messages = {
        "one more": "other_train_000000.bin: is not listed in the folder's",
        "one less": "words_train_000001.bin: is missing, but the folder's",
    }
    with pytest.raises(UserError, match=messages[change]):
        data(copied).setup("fit")


def test_test_time_training_is_refused_in_a_training_run(shard_folder: Path):
    module, other = data(shard_folder), data(shard_folder)
    module.evaluation = other.evaluation = EvaluationConfig(32, 8, 16, adapt_rate=0.1)
    module.setup("validate")
    with pytest.raises(UserError, match=r"eval\.adapt_rate belongs to trainer validate"):
        other.setup("fit")


def test_fewer_windows_than_processes_are_refused(shard_folder: Path):
    module = data(shard_folder)
    module.evaluation = EvaluationConfig(32, None, 16, fit_tokens=96)
    module.setup("fit")
    module.trainer = SimpleNamespace(world_size=3, global_rank=1, state=SimpleNamespace(fn="fit"))
    assert len(module.val_dataloader()[0].dataset) == 1
    module.trainer.world_size = 4
    with pytest.raises(UserError, match="96 validation targets make 3 windows of 32, fewer than 4 processes"):
        module.val_dataloader()


def test_another_tokenizer_than_the_manifests_is_refused(copied: Path):
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 1, path.name) for path in copied.glob("*.bin")]
    Manifest({}, "0" * 64, shards, {}, 0, {}).write(copied)
    with pytest.raises(UserError, match="is not the tokenizer that made the shards"):
        data(copied).setup("fit")


def test_a_vocabulary_of_another_size_than_the_models_is_refused(shard_folder: Path):
    module = data(shard_folder)
    module.vocab_size = 299
    with pytest.raises(UserError, match=r"vocabulary size is 300, but the model's 299; set --model\.vocab_size 300"):
        module.setup("fit")


def test_a_vocabulary_that_the_model_lacks_is_refused_before_the_text_is_made(shard_folder: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("Some text. " * 100)
    files, folder, tokenizer = [str(tmp_path / "a.txt")], str(tmp_path / "made"), str(shard_folder / TOKENIZER)
    for source in (
        LocalText(files, folder, tokenizer=tokenizer),
        LocalText(files, folder, vocab_size=300),
        PythonDocumentation(folder, vocab_size=300),
    ):
        with pytest.raises(
            UserError, match=r"vocabulary size is 300, but the model's 299; set --model\.vocab_size 300"
        ):
            TokenData(source, vocab_size=299).prepare_data()
    assert not Path(folder).exists()


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_calibration_reads_the_first_training_sequences_of_the_run(shard_folder: Path, order: str):
    module = TokenData(Shards(str(shard_folder)), 256, 32, order, seed=3, vocab_size=300)
    module.setup("fit")
    stream = TrainStream(TokenFiles(module.text.train), 256, 32, 3, order=order, seed=3)
    expected = torch.cat([stream[step] for step in range(3)])[:20]  # of 8 per step
    batches = list(module.calibration_sequences(20, torch.device("cpu")))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat(batches), expected)
    again = calibration_sequences(module.text, 20, 256, 32, order, 3, 300, sha256_of(module.text.tokenizer))
    assert torch.equal(torch.cat(list(again)), expected)


def test_calibration_has_smaller_batches_where_the_vocabulary_is_large(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    module = data(shard_folder)
    module.setup("fit")
    usual = list(module.calibration_sequences(12, torch.device("cpu")))
    monkeypatch.setattr("trainer.data.calibration.MAX_LOGITS", 3 * 32 * 300)
    small = list(module.calibration_sequences(12, torch.device("cpu")))
    assert max(len(rows) for rows in usual) == 8
    assert max(len(rows) for rows in small) == 3
    assert torch.equal(torch.cat(small), torch.cat(usual))


def test_calibration_refuses_another_tokenizer_and_a_token_beyond_the_vocabulary(copied: Path):
    text = Shards(str(copied)).prepared()
    settings = text, 8, 256, 32, "sequential", 0
    with pytest.raises(UserError, match=r"tokenizer\.model: is not the tokenizer this model was trained with"):
        list(calibration_sequences(*settings, 300, "0" * 64))
    highest = int(TokenFiles(text.train).read(0, 257).max())
    assert list(calibration_sequences(*settings, highest + 1, sha256_of(text.tokenizer)))
    with pytest.raises(UserError, match=rf"shards: holds token {highest}, but the vocabulary is {highest}"):
        list(calibration_sequences(*settings, highest, sha256_of(text.tokenizer)))
