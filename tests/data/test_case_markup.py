"""Tokenizers with case markup: every text comes back, and its bytes are those of the text without marks."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

from tests.helpers import score_of, trainer_here
from trainer.data.canonical import check_canonical, excluded_pairs
from trainer.data.case_markup import MARK, SPACE, marked_capitals
from trainer.data.manifest import Manifest
from trainer.data.tokenizer import BEGIN, ByteTable, load_tokenizer, normalized_bytes, train_tokenizer
from trainer.generation import prompt_tokens, stream_text

WORDS = "the cat sat on a mat in new york and mcdonald of nasa read it while she ran home to paris".split()
JUDGE = sentencepiece.SentencePieceNormalizer(
    rule_name="nmt_nfkc", remove_extra_whitespaces=True, add_dummy_prefix=False, escape_whitespaces=False
)


def marked(text: str) -> str:
    """A normalized text as it is encoded, letter by letter."""
    out = ""
    for index, letter in enumerate(text):
        if re.match("[A-Za-z][a-z]", text[index : index + 2]):
            is_start = text[:index].endswith((". ", "! ", "? "))
            if letter.isupper() != is_start:
                out = f"{out[:-1]}{MARK} " if out.endswith(" ") else out + MARK
            letter = letter.lower()
        out += letter
    return out


def sentence(rng: random.Random) -> str:
    words = [rng.choice((str, str.title, str.title, str.upper))(word) for word in rng.choices(WORDS, k=9)]
    return " ".join(words) + rng.choice(".!?")


def texts() -> Iterator[str]:
    """What capitals meet in text: spaces, line ends, punctuation, other scripts, and marks that are no marks."""
    rng = random.Random(1)
    yield from (
        "",
        "A",
        "I am",
        "The",
        " The  cat\n\nSat",
        "iPhone McDonald TVs NASA",
        "École Él Ürün",
        "A\u0301b Th\u0323e",
    )
    yield from (
        MARK,
        f"{MARK}the {MARK} cat",
        f"a {MARK}",
        "\ufb01Fi \u00a0The",
        f"x{SPACE}The",
        "\u3000The",
        "3Th 4TH",
    )
    yield from (
        ". the",
        ". The",
        ". T",
        "? t",
        "! a b",
        "U.S. and U.K. Army",
        "e.g. iPhone",
        f".{MARK} the",
        "..  Th. th",
    )
    parts = [*WORDS, *"ABTHabth", " ", "  ", "\n", "\u00a0", ".", ". ", "? T", "(", "é", "É", "漢", "🙂", "7", "\u0301"]
    parts += [MARK, SPACE]
    for _ in range(400):
        yield "".join(rng.choice((str, str.title))(rng.choice(parts)) for _ in range(rng.randint(1, 25)))
    yield from (sentence(rng) for _ in range(50))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("case") / "t.model"
    train_tokenizer((" ".join(sentence(rng) for _ in range(4)) for _ in range(1000)), 400, path, 1, case_markup=True)
    return path


def test_every_text_is_restored_and_its_bytes_are_counted(model: Path):
    tokenizer = load_tokenizer(model)
    table = ByteTable.from_tokenizer(tokenizer)
    for text in texts():
        truth = JUDGE.normalize(text).replace(MARK, "\ufffd").replace(SPACE, " ")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == truth, repr(text)
        assert normalized_bytes(tokenizer, text) == len(truth.encode()), repr(text)
        assert table.total(np.concatenate([BEGIN, np.array(ids, dtype=np.uint16)])) == len(truth.encode()), repr(text)


def test_a_tokenizer_is_the_same_each_time_and_names_no_place(tmp_path: Path):
    rng = random.Random(0)
    sentences = [sentence(rng) for _ in range(500)]
    models = []
    for index in range(2):
        train_tokenizer(iter(sentences), 400, tmp_path / f"{index}.model", 1, case_markup=True)
        models.append((tmp_path / f"{index}.model").read_bytes())
    assert models[0] == models[1]
    assert b"normalization.tsv" not in models[0]


def test_an_interrupted_training_says_so(tmp_path: Path):
    def sentences() -> Iterator[str]:
        yield from ["the cat"] * 10
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(sentences(), 300, tmp_path / "t.model", 1, case_markup=True)
    assert not list(tmp_path.iterdir())


def test_capitals_at_the_start_of_words_are_marked_and_no_others(model: Path):
    tokenizer = load_tokenizer(model)
    known = set(
        "".join(tokenizer.id_to_piece(t) for t in range(tokenizer.get_piece_size()) if not tokenizer.is_byte(t))
    )
    for text in texts():
        clean = JUDGE.normalize(text).replace(MARK, "\ufffd").replace(SPACE, " ")
        pieces = [piece for piece in tokenizer.encode(text, out_type=str) if not piece.startswith("<0x")]
        spelled = "".join(pieces).replace(SPACE, " ")
        expected = marked(clean)
        assert spelled == "".join(letter for letter in expected if letter.replace(" ", SPACE) in known), repr(text)


def test_words_share_their_tokens_with_and_without_a_capital(model: Path):
    tokenizer = load_tokenizer(model)
    small, capital = tokenizer.encode("on the mat", out_type=str), tokenizer.encode("On The. Mat", out_type=str)
    assert "".join(capital).replace(MARK, "").replace(".", "") == "".join(small)
    assert [piece for piece in capital if not set(piece) <= {MARK, "."}] == small
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.get_piece_size())]
    assert [piece for piece in pieces if MARK in piece] == [MARK]


def test_the_letters_that_are_marked(model: Path):
    tokenizer = load_tokenizer(model)
    for text, marked in (
        ("The cat. In Paris", "^the cat. in^ paris"),
        ("the cat. in Paris? he", "the cat.^ in^ paris?^ he"),
        ("Oh! A cat. I. NASA. É, .The", "^oh! A cat. I. NASA. É, .^the"),
        ("McDonald iPhone NASAs", "^mc^donald i^phone NAS^as"),
        ("I NASA A Él É", "I NASA A Él É"),
    ):
        spelled = bytes(
            byte
            for piece in tokenizer.encode(text, out_type=str)
            for byte in ([int(piece[3:-1], 16)] if piece.startswith("<0x") else piece.encode())
        )
        assert spelled.decode().replace(SPACE, " ").replace(MARK, "^") == marked


def test_a_capital_does_not_change_the_tokens_before_it(model: Path):
    tokenizer = load_tokenizer(model)
    for start in ("the cat.", "Answer:", "(", "on", "the cat ", ""):
        alone, whole = tokenizer.encode(start), tokenizer.encode(f"{start.rstrip()} The mat")
        assert whole[: len(alone)] == alone, start


def test_sentencepiece_alone_reads_what_it_encodes(model: Path):
    alone, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model)), load_tokenizer(model)
    counted, expected = ByteTable.from_tokenizer(alone), ByteTable.from_tokenizer(tokenizer)
    assert torch.equal(counted.text_bytes, expected.text_bytes)
    for text in ("The cat. In New York", "iPhone TVs NASA"):
        assert alone.encode(text) == tokenizer.encode(text)
        assert alone.decode(tokenizer.encode(text)) == text


def test_lists_of_texts_are_encoded_and_decoded_like_single_ones(model: Path):
    tokenizer = load_tokenizer(model)
    several = ["The  cat", "", f"In {MARK} Paris"]
    ids = tokenizer.encode(several)
    assert ids == [tokenizer.encode(text) for text in several]
    assert [list(each) for each in tokenizer.encode_as_numpy(several, num_threads=2)] == ids
    assert tokenizer.decode(ids) == [tokenizer.decode(each) for each in ids] == ["The cat", "", "In \ufffd Paris"]


def test_a_mark_is_not_shown_before_its_letter_is_there(model: Path):
    tokenizer = load_tokenizer(model)
    for text in ("the cat. The Mat. A", "the cat. the Mat? Then. a", "the cat. Th. th. T", "the cat. t"):
        whole = tokenizer.encode(text)
        shown = list(stream_text(tokenizer, whole[:3], iter(whole[3:])))
        assert MARK not in "".join(shown)
        assert tokenizer.decode(whole[:3]) + "".join(shown) == text
    assert tokenizer.decode(tokenizer.encode("Cat")[:1]) == ""


def test_a_letter_at_the_end_of_a_prompt_stays_small(model: Path, tmp_path: Path):
    tokenizer = load_tokenizer(model)
    train_tokenizer((" ".join(WORDS) for _ in range(9)), 300, tmp_path / "plain.model", 1)
    plain = load_tokenizer(tmp_path / "plain.model")
    for prompt in ("the cat. t", "on a mat? a", "the cat. The", "the cat t", "the cat.", "t", "", "cat. T"):
        ids, more = prompt_tokens(tokenizer, prompt), tokenizer.encode("the mat")
        assert tokenizer.decode(ids) == prompt
        assert tokenizer.decode(ids + more) == f"{prompt}the mat"
        assert prompt + "".join(stream_text(tokenizer, ids, iter(more))) == f"{prompt}the mat"
        assert prompt_tokens(plain, prompt) == plain.encode(prompt)


def test_no_text_has_a_pair_that_canonical_scoring_excludes(model: Path):
    tokenizer = load_tokenizer(model)
    ids = [token for text in texts() for token in (1, *tokenizer.encode(text))]
    excluded = excluded_pairs(tokenizer)
    assert excluded.any()
    check_canonical(torch.tensor(ids), excluded, tokenizer, "here", "mend it")


def test_a_run_with_case_markup_scores_the_same_bytes(tmp_path: Path):
    rng = random.Random(3)
    (tmp_path / "t.txt").write_text("\n\n".join(sentence(rng) for _ in range(2000)))
    args = ["--data.source=LocalText", "--data.source.train_files=t.txt", "--data.source.vocab_size=400"]
    counted = {}
    for markup, option in (("false", "false"), ("true", "null")):
        folder = [f"--data.source.folder={markup}", f"--data.case_markup={option}"]
        result = trainer_here("prepare", *args, *folder, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        manifest = Manifest.read(tmp_path / markup)
        assert manifest is not None
        counted[markup] = sum(shard.bytes for shard in manifest.shards)
    assert counted["true"] == counted["false"]
    small = ["--model.vocab_size=400", "--trainer.max_steps=2", "--report.enabled=false"]
    result = trainer_here("fit", *args, *folder, *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    again = trainer_here("validate", "--ckpt", "runs/quickstart/1/artifact.zst", "--eval.canonical=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    manifest = Manifest.read(tmp_path / "true")
    assert manifest is not None
    assert score_of(again.stdout)["bytes"] == sum(shard.bytes for shard in manifest.shards if shard.split == "val")


def test_inspect_says_what_the_tokenizer_marks(model: Path, tmp_path: Path):
    assert marked_capitals(load_tokenizer(model)) == "capitals that do not follow the end of a sentence"
    assert marked_capitals(SimpleNamespace(encode=lambda text, out_type: [MARK, "a"])) == "all capitals"
    (tmp_path / "t.txt").write_text("\n\n".join(sentence(random.Random(seed)) for seed in range(300)))
    args = ["--data.source=LocalText", "--data.source.train_files=t.txt", f"--data.source.tokenizer={model}"]
    assert trainer_here("prepare", *args, cwd=tmp_path).returncode == 0
    shown = trainer_here("inspect", "data/t", cwd=tmp_path).stdout
    assert shown.startswith("tokenizer.model  400 tokens  case markup of capitals that do not follow the end of a")


def test_every_name_of_a_method_knows_the_marks(model: Path):
    tokenizer = load_tokenizer(model)
    text, ids = "The  \ufb01n Cat\n\nOn", tokenizer.encode("The \ufb01n Cat On")
    for encode in (tokenizer.Encode, tokenizer.tokenize, tokenizer.Tokenize, tokenizer.EncodeAsIds, tokenizer.encode):
        assert encode(text) == ids == encode(text.encode())
    for decode in (tokenizer.Decode, tokenizer.detokenize, tokenizer.Detokenize, tokenizer.DecodeIds):
        assert decode(ids) == "The fin Cat On"
    assert tokenizer.decode(ids, bytes) == b"The fin Cat On"
    assert tokenizer.Normalize([text]) == [tokenizer.normalize(text)] == [f"The{SPACE}fin{SPACE}Cat{SPACE}On"]


def test_shards_of_before_the_setting_are_kept(model: Path, tmp_path: Path):
    (tmp_path / "t.txt").write_text("\n\n".join(sentence(random.Random(seed)) for seed in range(300)))
    args = ["--data.source=LocalText", "--data.source.train_files=t.txt", "--data.source.vocab_size=400"]
    assert trainer_here("prepare", *args, "--data.case_markup=false", cwd=tmp_path).returncode == 0
    manifest = tmp_path / "data/t/manifest.json"
    content = json.loads(manifest.read_text())
    assert content["source"].pop("case_markup") is False
    manifest.write_text(json.dumps(content))
    before = (tmp_path / "data/t/tokenizer.model").read_bytes()
    assert trainer_here("prepare", *args, cwd=tmp_path).returncode == 0
    assert (tmp_path / "data/t/tokenizer.model").read_bytes() == before


def test_a_tokenizer_of_the_other_kind_is_refused(model: Path, tmp_path: Path):
    (tmp_path / "t.txt").write_text("The cat")
    train_tokenizer((" ".join(WORDS) for _ in range(9)), 300, tmp_path / "plain.model", 1)
    for tokenizer, option, message in (
        (model, "false", f"{model}: this tokenizer has case markup, but data.case_markup is false; give --data.case_"),
        ("plain.model", "true", "plain.model: this tokenizer has no case markup, but data.case_markup is true; give "),
    ):
        args = ["--data.source=LocalText", "--data.source.train_files=t.txt", f"--data.source.tokenizer={tokenizer}"]
        result = trainer_here("prepare", *args, f"--data.case_markup={option}", cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert message in result.stderr
    assert not (tmp_path / "data").exists()
