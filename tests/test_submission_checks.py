"""What a judge checks: each check passes for a real model, and catches a model or a text with the fault."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ALL_OPTIONS, TINY, make_documents
from trainer.data.sources import LocalText
from trainer.data.tokenizer import BOS, ByteTable, load_tokenizer
from trainer.errors import UserError
from trainer.model.transformer import Transformer
from trainer.submission.checks import check_causality, check_normalization, check_splits, count_bytes

TOKENS = torch.arange(40) * 7 % 300


def model_of(config=TINY) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS], ids=["reference", "all options"])
def test_a_real_model_is_causal_and_normalized(config):
    assert check_causality(model_of(config), TOKENS).startswith("causal: ")
    assert "add up to 1.0000" in check_normalization(model_of(config), TOKENS)


def test_a_model_that_sees_the_future_is_caught(monkeypatch: pytest.MonkeyPatch):
    model = model_of()
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda ids: embed(ids) + 0.1 * embed(ids).roll(-1, dims=1))
    with pytest.raises(UserError, match="sees the future"):
        check_causality(model, TOKENS)


def test_a_loss_that_is_no_probability_is_caught(monkeypatch: pytest.MonkeyPatch):
    model = model_of()
    nll = model.nll
    monkeypatch.setattr(model, "nll", lambda *args: nll(*args) - 0.01)
    with pytest.raises(UserError, match=r"add up to 1\.01"):
        check_normalization(model, TOKENS)


@pytest.mark.parametrize("cut", [None, 500, 501, 502, 503])
def test_bytes_are_those_of_the_text_wherever_it_is_cut(shard_folder: Path, cut: int | None):
    tokenizer = load_tokenizer(shard_folder / "tokenizer.model")
    documents = [text + " grüße 猫" for text in make_documents(20, 3)]  # spelled in bytes
    tokens = np.array([token for ids in tokenizer.encode(documents) for token in (BOS, *ids)], dtype=np.uint16)[:cut]
    if cut is None:
        assert count_bytes(tokenizer, tokens) == sum(len(text.encode()) for text in documents)
    assert count_bytes(tokenizer, tokens) == ByteTable.from_tokenizer(tokenizer).total(tokens)
    without_start = tokens[5:]
    assert count_bytes(tokenizer, without_start) == ByteTable.from_tokenizer(tokenizer).total(without_start)


def test_the_splits_are_compared_where_a_manifest_lists_them(tmp_path: Path, shard_folder: Path):
    (tmp_path / "a.txt").write_text("\n".join(make_documents(100, 4)))
    LocalText(str(tmp_path / "a.txt"), str(tmp_path / "o"), vocab_size=300).prepare()
    assert check_splits(tmp_path / "o") == (
        "splits: none of the 2 documents is both in training and in validation text"
    )
    assert "not checked" in check_splits(shard_folder)
