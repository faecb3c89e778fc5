"""Small data that every test can make: no download, nothing outside the repository."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from trainer.data.shards import write_shard
from trainer.data.tokenizer import BOS, load_tokenizer, train_tokenizer
from trainer.model.attention import AttentionConfig
from trainer.model.config import LoopConfig, TransformerConfig
from trainer.model.embedding import BigramConfig, SmearConfig

torch.set_num_threads(1)  # the processes that run side by side share the cores
# On a busy machine the first example of a test may take seconds.
settings.register_profile("golf", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("golf")
ROOT = Path(__file__).parents[1]

TINY = TransformerConfig(
    vocab_size=300,
    num_layers=4,
    model_dim=32,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    bigram=BigramConfig(buckets=64, dim=16),
)
# The same with every option of the model switched on.
ALL_OPTIONS = replace(
    TINY,
    attention=replace(
        TINY.attention, rope_dims=4, key_offset=True, xsa=True, gate_dims=6, window=3, window_pattern="SL"
    ),
    bigram=BigramConfig(buckets=None),
    smear=SmearConfig("per_token", 5),
    loop=LoopConfig(repeats=1, first=1, last=2),
    value_embedding_blocks=3,
)
TINY_OPTIONS = [
    "--model.vocab_size=300",
    "--model.num_layers=4",
    "--model.model_dim=32",
    "--model.attention.num_heads=4",
    "--model.attention.num_kv_heads=2",
    "--model.bigram.buckets=64",
    "--model.bigram.dim=16",
    "--data.batch_tokens=256",
    "--data.sequence_length=32",
    "--eval.window=32",
    "--eval.stride=8",
    "--eval.batch_windows=16",
    "--eval.fit_tokens=256",
    "--eval.max_tokens=300",
    "--report.enabled=false",  # its samples would take most of the time
]

TEXT = "the model reads a token and then it writes another one of them while 12 small cats sleep on warm stones"
WORDS = TEXT.split(" ")


def make_documents(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards, one validation shard and a tokenizer with a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("shards")
    train = make_documents(400, 0)
    train_tokenizer(iter(train), 300, folder / "tokenizer.model", 1)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    splits = {"train_000000": train[:200], "train_000001": train[200:], "val_000000": make_documents(40, 1)}
    for name, documents in splits.items():
        tokens = [token for ids in tokenizer.encode(documents) for token in (BOS, *ids)]
        write_shard(folder / f"words_{name}.bin", np.array(tokens, dtype=np.uint16))
    return folder


@pytest.fixture(scope="session")
def tiny_overrides(shard_folder: Path) -> dict[str, object]:
    """A run of eight steps of a small model, for `trainer.fit`."""
    values = {name.removeprefix("--"): yaml.safe_load(value) for name, value in (o.split("=") for o in TINY_OPTIONS)}
    schedule = {"trainer.max_steps": 8, "model.schedule.warmdown_steps": 6, "trainer.log_every_n_steps": 1}
    averaging = {"averaging.every": 2, "averaging.start_frac": 0.6}
    return {"data.source.folder": shard_folder, **values, **schedule, **averaging, "trainer.val_check_interval": 4}
