"""Copies of shards with case markup: the same documents, splits and bytes, whatever the shards cut."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.data.test_case_markup import WORDS
from tests.helpers import score_of, trainer_here
from trainer.data.case_markup import has_case_markup
from trainer.data.local_text import LocalText
from trainer.data.manifest import Manifest
from trainer.data.shards import TokenFiles, open_shard, write_shard
from trainer.data.sources import Shards
from trainer.data.tokenizer import BOS, load_tokenizer, train_tokenizer
from trainer.errors import UserError

JUDGE = sentencepiece.SentencePieceNormalizer(
    rule_name="nmt_nfkc", remove_extra_whitespaces=True, add_dummy_prefix=False, escape_whitespaces=False
)


COPY = "data/published-case-markup-380"


def document(rng: random.Random) -> str:
    words = [rng.choice((str, str.title, str.upper))(word) for word in rng.choices(WORDS, k=rng.randint(1, 40))]
    return " ".join([*words, rng.choice(("", "漢字 é", "  two\nlines", "🙂."))])


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    rng = random.Random(0)
    return {split: [document(rng) for _ in range(count)] for split, count in (("train", 900), ("val", 60))}


@pytest.fixture
def folder(tmp_path: Path, documents: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training shards, between which a document is cut, and a validation shard, without case markup."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "published"
    folder.mkdir()
    train_tokenizer(iter(documents["train"]), 400, folder / "tokenizer.model", 1)
    train, val = (tokens_of(folder, documents[split]) for split in ("train", "val"))
    middle = len(train) // 2
    assert BOS not in train[middle : middle + 2]
    write_shard(folder / "x_train_000000.bin", train[:middle])
    write_shard(folder / "x_train_000001.bin", train[middle:])
    write_shard(folder / "x_val_000000.bin", val)
    return folder


def tokens_of(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    return np.array([token for text in texts for token in (BOS, *tokenizer.encode(text))], dtype=np.uint16)


def source(folder: Path, vocab_size: int = 380) -> Shards:
    shards = Shards(str(folder))
    shards.model_vocab_size, shards.case_markup = vocab_size, True
    return shards


def texts_of(shards: list[Path], model: Path) -> list[str]:
    files = TokenFiles(shards)
    tokens = files.read(0, len(files))
    tokenizer = load_tokenizer(model)
    return [tokenizer.decode(each[1:].tolist()) for each in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]


def test_the_copy_has_the_same_documents_and_bytes(folder: Path, documents: dict[str, list[str]]):
    copied = source(folder)
    assert not copied.is_prepared()
    assert copied.known_vocab_size() is None
    copied.prepare()
    assert copied.is_prepared()
    text = copied.prepared()
    assert text.tokenizer.resolve() == folder.parent / COPY / "tokenizer.model"
    assert has_case_markup(load_tokenizer(text.tokenizer))
    assert load_tokenizer(text.tokenizer).get_piece_size() == 380
    manifest = Manifest.read(text.tokenizer.parent)
    assert manifest is not None
    for split, shards in (("train", text.train), ("val", text.val)):
        expected = [JUDGE.normalize(each) for each in documents[split]]
        assert texts_of(shards, text.tokenizer) == expected
        counted = sum(shard.bytes for shard in manifest.shards if shard.split == split)
        assert counted == sum(len(each.encode()) for each in expected)


def test_it_is_made_once_for_each_vocabulary_and_always_the_same(folder: Path):
    source(folder).prepare()
    files = sorted((folder.parent / COPY).iterdir())
    contents, first = [path.read_bytes() for path in files], files[0].stat().st_mtime_ns
    source(folder).prepare()
    source(folder, 390).prepare()
    assert files[0].stat().st_mtime_ns == first
    assert load_tokenizer(folder.parent / "data/published-case-markup-390/tokenizer.model").get_piece_size() == 390
    os.utime(folder / "x_val_000000.bin")
    source(folder).prepare()
    assert files[0].stat().st_mtime_ns == first
    shard = folder / "x_train_000001.bin"
    tokens = np.array(open_shard(shard))
    write_shard(shard, tokens[:-1])
    source(folder).prepare(only_if_missing=True)
    source(folder).prepared()
    assert files[0].stat().st_mtime_ns == first
    source(folder).prepare()
    assert files[0].stat().st_mtime_ns != first
    write_shard(shard, tokens)
    source(folder).prepare()
    assert [path.read_bytes() for path in files] == contents  # runs of before can go on


def test_a_copy_with_other_rules_is_made_anew(folder: Path):
    source(folder).prepare()
    manifest = folder.parent / COPY / "manifest.json"
    content = json.loads(manifest.read_text())
    content["source"]["case_markup"] = 1
    manifest.write_text(json.dumps(content))
    assert not source(folder).is_prepared()
    source(folder).prepare(only_if_missing=True)  # a run that resumes
    assert json.loads(manifest.read_text()) == content
    source(folder).prepare()
    assert source(folder).is_prepared()


def test_the_copy_is_used_where_the_original_is_gone(folder: Path):
    source(folder).prepare()
    prepared = source(folder).prepared()
    folder.rename(folder.parent / "elsewhere")
    away = source(folder)
    assert away.is_prepared()
    assert away.known_vocab_size() is None
    away.prepare()
    assert away.prepared() == prepared
    with pytest.raises(UserError, match="published: is not a folder"):
        source(folder, 390).prepare()


def test_shards_with_case_markup_are_used_as_they_are(folder: Path):
    source(folder).prepare()
    marked = source(folder.parent / COPY)
    marked.check()
    marked.prepare()
    assert marked.is_prepared()
    assert marked.known_vocab_size() == 380
    assert marked.prepared().tokenizer == folder.parent / COPY / "tokenizer.model"
    assert [path.name for path in (folder.parent / "data").iterdir()] == ["published-case-markup-380"]


def test_a_last_training_document_that_is_cut_inside_a_character_is_left_out(
    folder: Path, documents: dict[str, list[str]]
):
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    cut = [BOS, *tokenizer.encode("the cat 𝄞")[:-2]]
    assert "\ufffd" in tokenizer.decode(cut[1:])
    train = np.concatenate([tokens_of(folder, documents["train"][:500]), np.array(cut, dtype=np.uint16)])
    write_shard(folder / "x_train_000000.bin", train)
    (folder / "x_train_000001.bin").unlink()
    copied = source(folder)
    copied.prepare()
    text = copied.prepared()
    assert texts_of(text.train, text.tokenizer) == [JUDGE.normalize(each) for each in documents["train"][:500]]
    write_shard(folder / "x_val_000000.bin", train)
    with pytest.raises(UserError, match=r"the document that begins 'the cat .*' cannot be encoded again without a"):
        copied.prepare()


def test_training_shards_may_begin_and_end_anywhere(folder: Path, documents: dict[str, list[str]]):
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    space = tokenizer.piece_to_id("\u2581")
    whole = tokens_of(folder, documents["train"][:500])
    second = int(np.flatnonzero(whole == BOS)[1])
    word = next(i for i in range(2, second) if tokenizer.id_to_piece(int(whole[i])).startswith("\u2581"))
    cut = np.array([*whole[word:], BOS, *tokenizer.encode("the cat"), space], dtype=np.uint16)
    write_shard(folder / "x_train_000000.bin", cut)
    (folder / "x_train_000001.bin").unlink()
    copied = source(folder)
    copied.prepare()
    text = copied.prepared()
    assert texts_of(text.train, text.tokenizer) == [JUDGE.normalize(each) for each in documents["train"][1:500]]


def test_rare_characters_and_empty_documents_stay_as_they_are(folder: Path, documents: dict[str, list[str]]):
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    texts = ["\ufb01\u0301 The \u2167\u0301", "", "a \u2103\u0301 Cat", *documents["val"]]
    twice = [JUDGE.normalize(JUDGE.normalize(each)) for each in texts]
    once = [JUDGE.normalize(each) for each in texts]
    assert once != twice
    write_shard(folder / "x_val_000000.bin", tokens_of(folder, texts))
    copied = source(folder)
    copied.prepare()
    text = copied.prepared()
    assert texts_of(text.val, text.tokenizer) == once == [tokenizer.decode(each) for each in tokenizer.encode(texts)]
    manifest = Manifest.read(text.tokenizer.parent)
    assert manifest is not None
    counted = [shard.bytes for shard in manifest.shards if shard.split == "val"]
    assert counted == [sum(len(each.encode()) for each in once)]


def test_what_is_no_text_of_the_tokenizer_is_refused_in_a_line(folder: Path, documents: dict[str, list[str]]):
    val = tokens_of(folder, documents["val"])
    strange = val.copy()
    strange[5] = 5000
    for tokens, message in (
        (strange, "holds token 5000, but the tokenizer's vocabulary size is 400"),
        (val[val != BOS], r"no document begins with token 1 \(BOS\)"),
    ):
        write_shard(folder / "x_val_000000.bin", tokens)
        with pytest.raises(UserError, match=message):
            source(folder).prepare()
    assert not (folder.parent / COPY).exists()


def test_the_tokenizer_must_be_the_one_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    Path("t.jsonl").write_text("".join(json.dumps({"text": document(rng)}) + "\n" for _ in range(600)))
    for name, size in (("one", 400), ("two", 390)):
        plain = LocalText("t.jsonl", name, vocab_size=size)
        plain.case_markup = False
        plain.prepare()
    mixed = Shards("one", "two/tokenizer.model")
    mixed.model_vocab_size, mixed.case_markup = 380, True
    for act in (mixed.check, mixed.prepare):
        with pytest.raises(UserError, match="is not the tokenizer that made the shards in one"):
            act()


def test_a_text_may_begin_without_the_token_of_a_beginning(folder: Path, documents: dict[str, list[str]]):
    val = tokens_of(folder, documents["val"])
    write_shard(folder / "x_val_000000.bin", val[1:])
    copied = source(folder)
    copied.prepare()
    text = copied.prepared()
    assert texts_of(text.val, text.tokenizer) == [JUDGE.normalize(each) for each in documents["val"]]


def test_documents_longer_than_a_batch_are_whole(
    folder: Path, documents: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer.data.retokenize.CHUNK_TOKENS", 7)
    copied = source(folder)
    copied.prepare()
    text = copied.prepared()
    assert texts_of(text.train, text.tokenizer) == [JUDGE.normalize(each) for each in documents["train"]]


def test_a_vocabulary_that_cannot_be_trained_is_refused_before_anything_is_read(folder: Path):
    with pytest.raises(UserError, match="model.vocab_size must be between 261"):
        source(folder, 100).check()
    assert not (folder.parent / "data").exists()


def test_a_folder_of_somebody_else_is_left_alone(folder: Path):
    other = folder.parent / COPY / "mine.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    for act in (source(folder).check, source(folder).prepare):
        with pytest.raises(UserError, match=r"holds mine.txt, which this trainer did not make"):
            act()
    assert other.read_text() == "mine"


def test_a_copy_of_other_shards_is_not_replaced(folder: Path):
    source(folder).prepare()
    model = folder.parent / COPY / "tokenizer.model"
    content = model.read_bytes()
    other = folder.parent / "other/published"
    shutil.copytree(folder, other)
    assert source(other).is_prepared()  # the same shards in another place
    for path in other.glob("*.bin"):
        tokens = TokenFiles([path])
        write_shard(path, np.concatenate([[BOS], tokens.read(0, len(tokens))]).astype(np.uint16))
    for act in (source(other).check, source(other).prepare, source(other).prepared):
        with pytest.raises(UserError, match=r"is a copy of other shards than these; run from another folder, or rem"):
            act()
    assert model.read_bytes() == content


def test_a_run_trains_on_the_copy_and_is_scored_on_it(folder: Path, documents: dict[str, list[str]]):
    options = ["--data.source=Shards", "--data.source.folder=published", "--data.case_markup=true"]
    small = ["--model.vocab_size=380", "--trainer.max_steps=2", "--report.enabled=false"]
    result = trainer_here("fit", *options, *small, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    resumed = trainer_here(
        "fit", *options[:2], *small, "--data.case_markup=false", "--ckpt=last", "--run_name=1", cwd=folder.parent
    )
    assert (resumed.returncode, resumed.stderr.count("\n")) == (1, 1), resumed.stderr
    assert "1/tokenizer.model: this tokenizer has case markup, but data.case_markup is false" in resumed.stderr
    marked = ["--data.source=Shards", f"--data.source.folder={COPY}", "--data.case_markup=false"]
    refused = trainer_here("fit", *marked, *small, cwd=folder.parent)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "tokenizer.model: this tokenizer has case markup, but data.case_markup is false" in refused.stderr
    again = trainer_here("validate", "--ckpt", "runs/quickstart/1/artifact.zst", cwd=folder.parent)
    assert again.returncode == 0, again.stderr
    assert score_of(again.stdout)["bytes"] == sum(len(JUDGE.normalize(each).encode()) for each in documents["val"])
    _submit_and_copy_again(folder)


def _submit_and_copy_again(folder: Path) -> None:
    """A submission says how to make the copy that the run was scored on, and it becomes the same."""
    who = ["--name=a", "--author=b", "--github_id=c", "--track=d", f"--data={COPY}", "--out=submitted"]
    result = trainer_here("submit", "runs/quickstart/1", *who, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    command = next(
        line
        for line in (folder.parent / "submitted/README.md").read_text().splitlines()
        if line.startswith("python train_gpt.py prepare")
    )
    judge = folder.parent / "judge"
    shutil.copytree(folder.parent / "submitted", judge)
    shutil.copytree(folder, judge / "published")
    words = [sys.executable, *command.replace("OTHER", "published").split()[1:]]
    subprocess.run(words, cwd=judge, check=True, capture_output=True)
    made, scored = (
        {path.name: path.read_bytes() for path in each.iterdir()} for each in (judge / COPY, folder.parent / COPY)
    )
    assert made == scored


def test_a_copy_of_prepared_text_counts_as_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    Path("t.jsonl").write_text("".join(json.dumps({"text": document(rng)}) + "\n" for _ in range(600)))
    plain = LocalText("t.jsonl", "plain", vocab_size=400)
    plain.case_markup = False
    plain.prepare()
    copied = source(Path("plain"))
    copied.prepare()
    one, two = Manifest.read(Path("plain")), Manifest.read(copied.prepared().tokenizer.parent)
    assert one is not None
    assert two is not None
    assert one.text_fingerprint == two.text_fingerprint
    assert one.tokenizer_sha256 != two.tokenizer_sha256


def test_another_normalization_than_the_challenges_is_refused(folder: Path, documents: dict[str, list[str]]):
    model = folder / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents["train"]),
        model_prefix=str(folder.parent / "other"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder.parent / "other.model").replace(model)
    for split, name in (("train", "x_train_000000.bin"), ("val", "x_val_000000.bin")):
        write_shard(folder / name, tokens_of(folder, documents[split]))
    (folder / "x_train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"the document that begins '.*' cannot be encoded again without a change"):
        source(folder).prepare()
    assert not (folder.parent / COPY).exists()
