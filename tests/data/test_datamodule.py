"""What the data module refuses before the first step."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.data.manifest import Manifest
from trainer.data.shards import write_shard
from trainer.data.sources import Shards
from trainer.datamodule import TokenData
from trainer.errors import UserError
from trainer.evaluation.windows import EvaluationConfig


def data(folder: Path) -> TokenData:
    return TokenData(Shards(str(folder)), 256, 32, vocab_size=300, evaluation=EvaluationConfig(32, 8, 16))


@pytest.fixture
def copied(shard_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_folder, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["words_train_000001.bin", "words_val_000000.bin"])
def test_a_token_beyond_the_vocabulary_is_found_before_training(copied: Path, name: str):
    data(copied).setup("fit")
    write_shard(copied / name, np.array([1] + [7] * 5_000 + [300], dtype=np.uint16))
    with pytest.raises(UserError, match=rf"{name}: holds token 300, but the tokenizer has only 300 pieces"):
        data(copied).setup("fit")


def test_another_tokenizer_than_the_manifests_is_refused(copied: Path):
    Manifest({}, "0" * 64, [], {}).write(copied)
    with pytest.raises(UserError, match="is not the tokenizer that made the shards"):
        data(copied).setup("fit")
