"""A stranger's own few files: they are prepared without further options, or the error names the option to give."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_documents
from tests.helpers import trainer_here
from trainer.data.local_text import split_last_tenth
from trainer.data.manifest import Manifest, verify
from trainer.data.shards import open_shard
from trainer.data.tokenizer import BOS, load_tokenizer

LOCAL = ["--data.source=LocalText", "--data.source.train_files=texts"]


def write_texts(folder: Path, count: int, lines: int) -> list[str]:
    """Files of lines, each text once."""
    folder.mkdir()
    texts = ["\n".join(make_documents(lines, seed)) + "\n" for seed in range(count)]
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    return texts


@pytest.mark.parametrize("count", [1, 5])
def test_a_few_files_are_enough_and_their_last_tenth_is_for_validation(count: int, tmp_path: Path):
    texts = write_texts(tmp_path / "texts", count, 400 // count)
    result = trainer_here("prepare", *LOCAL, "--data.source.vocab_size=300", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    start = f"the last tenth of the text, from texts/{count - 1}.txt on"
    said = f"few texts ({count} document{'s' * (count > 1)}): the validation split is {start}"
    assert said in result.stdout
    folder = tmp_path / "data/texts"  # named after the files
    assert verify(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    read = {}
    for split in ("train", "val"):
        ids = open_shard(folder / f"text_{split}_000000.bin").tolist()
        read[split] = "".join(tokenizer.decode([each for each in ids if each != BOS]).split())
    assert read["train"] + read["val"] == "".join("".join(texts).split())
    assert len(read["val"]) == pytest.approx(len(read["train"]) / 9, rel=0.1)
    assert Manifest.read(folder).source["train_files"][0][0] == "texts/0.txt"


def test_the_vocabulary_that_the_text_can_carry_is_named_and_works(tmp_path: Path):
    write_texts(tmp_path / "texts", 1, 4)
    refused = trainer_here("fit", "--config=quickstart", *LOCAL, cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "not of 1,024; give more text, or --model.vocab_size " in refused.stderr
    size = refused.stderr.split()[-1]
    refused = trainer_here("prepare", *LOCAL, cwd=tmp_path)
    assert refused.stderr.endswith(f"give more text, or --data.source.vocab_size {size}\n")
    assert not (tmp_path / "data/texts").exists()
    taken = trainer_here("prepare", *LOCAL, f"--data.source.vocab_size={size}", cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
    assert load_tokenizer(tmp_path / "data/texts/tokenizer.model").get_piece_size() == int(size)
    result = trainer_here("prepare", *LOCAL, f"--data.source.vocab_size={int(size) + 1}", cwd=tmp_path)
    assert result.returncode == 1


def test_the_vocabulary_size_is_that_of_the_model_or_of_the_recipe(tmp_path: Path):
    write_texts(tmp_path / "texts", 1, 400)
    (tmp_path / "mine.yaml").write_text("model:\n  vocab_size: 290\n")
    assert trainer_here("prepare", "--config=mine.yaml", *LOCAL, cwd=tmp_path).returncode == 0
    assert load_tokenizer(tmp_path / "data/texts/tokenizer.model").get_piece_size() == 290
    steps = ["--model.vocab_size=285", "--trainer.max_steps=1", "--eval.max_tokens=200", "--report.enabled=false"]
    result = trainer_here("fit", *LOCAL, *steps, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_tokenizer(tmp_path / "data/texts/tokenizer.model").get_piece_size() == 285
    read, scored = (len(open_shard(tmp_path / f"data/texts/text_{split}_000000.bin")) for split in ("train", "val"))
    numbers = f"{read:,} tokens for training, {scored - 1:,} for validation (so few that their scores are noisy)"
    assert f"text in data/texts: {numbers}" in result.stdout
    submit = (
        "trainer submit runs/quickstart/1 --data data/texts "
        "--name NAME --author AUTHOR --github_id ID --track non-record-16mb"
    )
    assert submit in result.stdout


def test_a_folder_that_nobody_chose_is_never_that_of_the_text_or_of_others(tmp_path: Path):
    args = ["--data.source=LocalText", "--data.source.vocab_size=285"]
    (tmp_path / "data").mkdir()
    write_texts(tmp_path / "data/mine", 1, 100)
    inside = trainer_here("prepare", *args, "--data.source.train_files=data/mine", cwd=tmp_path)
    assert inside.returncode == 0, inside.stderr
    assert (tmp_path / "data/mine-shards/manifest.json").is_file()
    write_texts(tmp_path / "texts", 1, 100)
    (tmp_path / "other").mkdir()
    write_texts(tmp_path / "other/texts", 1, 90)
    assert trainer_here("prepare", *args, "--data.source.train_files=texts", cwd=tmp_path).returncode == 0
    refused = trainer_here("prepare", *args, "--data.source.train_files=other/texts", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "data/texts: holds the shards of other files; choose another data.source.folder" in refused.stderr


def test_what_the_tokenizer_changes_is_said_on_request(tmp_path: Path):
    write_texts(tmp_path / "texts", 3, 100)
    args = ["prepare", *LOCAL, "--data.source.vocab_size=285"]
    assert "normalization changed" not in trainer_here(*args, cwd=tmp_path).stdout
    more = trainer_here(*args, "--data.source.val_every=7", "--verbose", cwd=tmp_path)
    assert "normalization changed" in more.stdout


@given(st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=40), min_size=1, max_size=8))
def test_no_character_is_lost_or_in_both_parts(texts: list[str]):
    train, val = split_last_tenth(texts)
    joined = "".join([*train, *val])
    assert [letter for letter in joined if not letter.isspace()] == [
        letter for text in texts for letter in text if not letter.isspace()
    ]
    assert val
    total = len("".join(texts))
    assert total // 10 <= sum(map(len, val)) <= total // 10 + total // 50 + 2


def test_a_vocabulary_smaller_than_the_characters_of_the_text_names_the_smallest_that_works(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    characters = "".join(map(chr, range(0x3B1, 0x3F0)))
    (tmp_path / "texts/a.txt").write_text("\n".join(" ".join(characters[n:] + characters[:n]) for n in range(60)))
    refused = trainer_here("prepare", *LOCAL, "--data.source.vocab_size=270", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "needs a vocabulary of at least" in refused.stderr
    option, size = refused.stderr.split()[-2:]
    assert option == "--data.source.vocab_size"
    taken = trainer_here("prepare", *LOCAL, f"{option}={size}", cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
