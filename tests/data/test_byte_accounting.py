"""Bytes of text, for any tokenizer: counted exactly, or refused. SentencePiece's own normalizer is the judge."""

import io
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from trainer.data.case_markup import SPACE
from trainer.data.shard_writer import ShardWriter
from trainer.data.tokenizer import BEGIN, BOS, ByteTable, load_tokenizer, normalized_bytes
from trainer.errors import UserError

SETTINGS: dict[str, tuple[Any, Any]] = {
    "model_type": ("bpe", "unigram"),
    "byte_fallback": (True, False),
    "add_dummy_prefix": (True, False),
    "remove_extra_whitespaces": (True, False),
    "treat_whitespace_as_suffix": (True, False),
    "user_defined_symbols": ("", "<sep>,# ,7"),
    "normalization_rule_name": ("nmt_nfkc", "identity"),
    "has_spaces": (True, False),  # of the text: without them a model may have no token for a space
}
LETTERS = "abcdefgh"
COMBINATIONS = random.Random(2).sample(list(itertools.product(*SETTINGS.values())), 72)


def texts(seed: int) -> Iterator[str]:
    """Texts of known letters, with everything around them that a tokenizer may change or not know."""
    rng = random.Random(seed)
    odd = [
        " ",
        "  ",
        SPACE,
        f" {SPACE} ",
        "\t",
        "\n",
        "\u00a0",
        "\u3000",
        "é",
        "ﬁ",
        "漢",
        "🙂",
        "■",
        "▀",
        "<sep>",
        "# ",
        "7",
    ]
    yield from ("", " ", SPACE, "a", " a", "a ", "  a  b  ", f"{SPACE}a{SPACE}{SPACE}b", "a\r\nb", "<sep> a", "a# 7")
    for _ in range(80):
        yield "".join(rng.choice(odd) if rng.random() < 0.3 else rng.choice(LETTERS) for _ in range(rng.randint(1, 30)))


def train(path: Path, values: dict[str, Any]) -> None:
    has_spaces = values.pop("has_spaces")
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([(" " if has_spaces else "").join(rng.choices(words, k=8)) for _ in range(300)]),
        model_writer=model,
        vocab_size=340 if values["byte_fallback"] else 60,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        minloglevel=4,
        **values,
    )
    path.write_bytes(model.getvalue())


def test_every_pair_of_settings_is_tried_at_least_ten_times():
    pairs = Counter(
        pair for values in COMBINATIONS for pair in itertools.combinations(zip(SETTINGS, values, strict=True), 2)
    )
    assert len(pairs) == 4 * len(SETTINGS) * (len(SETTINGS) - 1) // 2
    assert min(pairs.values()) >= 10


@pytest.mark.parametrize("index", range(len(COMBINATIONS)))
def test_bytes_are_counted_exactly_or_refused(index: int, tmp_path: Path):
    values = dict(zip(SETTINGS, COMBINATIONS[index], strict=True))
    path = tmp_path / "tokenizer.model"
    train(path, dict(values))
    raw = sentencepiece.SentencePieceProcessor(model_file=str(path))
    adds_suffix = values["add_dummy_prefix"] and values["treat_whitespace_as_suffix"]
    spells_spaces = values["byte_fallback"] and raw.piece_to_id(SPACE) == raw.unk_id()
    if adds_suffix or spells_spaces:
        with pytest.raises(UserError, match="adds a space after every text" if adds_suffix else "no token for a space"):
            load_tokenizer(path)
        return
    tokenizer = load_tokenizer(path)
    judge = sentencepiece.SentencePieceNormalizer(
        rule_name=values["normalization_rule_name"],
        add_dummy_prefix=False,
        escape_whitespaces=True,
        remove_extra_whitespaces=values["remove_extra_whitespaces"],
    )
    table = ByteTable.from_tokenizer(tokenizer)
    for text in texts(index):
        truth = len(judge.normalize(text).replace(SPACE, " ").encode())
        ids = np.array(tokenizer.encode(text), dtype=np.uint16)
        assert normalized_bytes(tokenizer, text) == truth, text
        if tokenizer.unk_id() in ids:
            with pytest.raises(UserError, match="the tokenizer has no tokens for some of its characters"):
                ShardWriter(tmp_path, "train", table, 1000).add(ids, text, truth, "here")
        else:
            assert table.total(np.concatenate([BEGIN, ids])) == truth, (text, tokenizer.encode(text, out_type=str))
            ShardWriter(tmp_path, "train", table, 1000).add(ids, text, truth, "here")
