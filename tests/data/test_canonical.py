"""Which tokens can follow which, against SentencePiece itself and against BPE written out."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from tests.conftest import ALL_OPTIONS, TINY, make_documents
from trainer.data.canonical import excluded_pairs
from trainer.data.case_markup import SPACE
from trainer.data.shards import write_shard
from trainer.data.sources import Shards
from trainer.data.tokenizer import BOS, load_tokenizer, train_tokenizer
from trainer.datamodule import TokenData
from trainer.errors import UserError
from trainer.evaluation.sliding import score
from trainer.evaluation.windows import EvaluationConfig
from trainer.model.transformer import Transformer
from trainer.submission.checks import check_normalization

CONFIG = EvaluationConfig(32, 8, 16, canonical=True)


def few_letters(seed: int) -> list[str]:
    """Words of two letters, which can be merged in many ways."""
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices("ab", k=rng.randint(1, 9))) for _ in range(20)) for _ in range(200)]


@pytest.fixture(scope="module", params=["two letters", "words"])
def tokenizer(request, tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(iter(few_letters(0) if request.param == "two letters" else make_documents(400, 0)), 340, path, 1)
    return load_tokenizer(path)


def of_text(tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    kinds = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_byte)
    return [token for token in range(tokenizer.get_piece_size()) if not any(kind(token) for kind in kinds)]


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """BPE: the union with the highest score first, of equal ones the leftmost."""
    parts = list(text)
    while True:
        unions = [(scores[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not unions:
            return parts
        n = -max(unions)[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]


def test_the_pairs_are_those_that_bpe_merges_or_cuts_elsewhere(tokenizer: sentencepiece.SentencePieceProcessor):
    excluded, known = excluded_pairs(tokenizer), of_text(tokenizer)
    scores = {tokenizer.id_to_piece(token): tokenizer.get_score(token) for token in known}
    expected = torch.zeros_like(excluded)
    for a in known:
        for b in known:
            pair = [tokenizer.id_to_piece(a), tokenizer.id_to_piece(b)]
            expected[a, b] = merged("".join(pair), scores) != pair
    assert torch.equal(excluded, expected)
    assert 0.01 < excluded[known][:, known].float().mean() < 0.9


def test_sentencepiece_encodes_two_tokens_as_they_are_unless_the_pair_is_excluded(
    tokenizer: sentencepiece.SentencePieceProcessor,
):
    excluded, known = excluded_pairs(tokenizer), of_text(tokenizer)
    pieces = {token: tokenizer.id_to_piece(token) for token in known}
    # SentencePiece removes spaces at the start and at the end of a text.
    inner = [token for token in known if not pieces[token].startswith(SPACE)]
    pairs = [(a, b) for a in inner for b in known if pieces[b] != SPACE]
    encoded = tokenizer.encode([(pieces[a] + pieces[b]).replace(SPACE, " ") for a, b in pairs])
    assert [ids != list(pair) for ids, pair in zip(encoded, pairs, strict=True)] == [
        bool(excluded[pair]) for pair in pairs
    ]


@pytest.mark.parametrize(
    "options",
    [{"model_type": "unigram"}, {"model_type": "char"}, {"model_type": "bpe", "user_defined_symbols": ["ab"]}],
)
def test_a_tokenizer_whose_merges_are_not_known_is_refused(options: dict[str, object], tmp_path: Path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(100, 0)),
        model_prefix=str(tmp_path / "t"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    with pytest.raises(UserError, match="is not BPE, or has user-defined symbols"):
        excluded_pairs(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model")))


def test_no_encoded_text_has_an_excluded_pair(tokenizer: sentencepiece.SentencePieceProcessor):
    excluded = excluded_pairs(tokenizer)
    rng = random.Random(1)
    texts = [*few_letters(2), *make_documents(50, 3), "".join(rng.choices("ab the\u00e9\u4e2d,.", k=5000))]
    for ids in tokenizer.encode(texts):
        assert not excluded[ids[:-1], ids[1:]].any()


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS], ids=["reference", "all options"])
@pytest.mark.parametrize("is_graded", [False, True])
def test_the_probability_of_excluded_tokens_goes_to_the_others_in_proportion(config, is_graded: bool):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    excluded = torch.rand(300, 300) < 0.3
    ids = torch.randint(300, (2, 9))
    targets = torch.tensor([[int((~excluded[token]).nonzero()[n]) for n, token in enumerate(row)] for row in ids])
    with torch.set_grad_enabled(is_graded):
        result = model.nll(ids, targets, 4, excluded).detach().numpy()
    logits = model(ids).detach().double().numpy()[:, 4:]
    weights = np.exp(logits) * ~excluded[ids[:, 4:]].numpy()
    chosen = np.take_along_axis(weights, targets[:, 4:, None].numpy(), 2)[..., 0]
    assert np.allclose(result, -np.log(chosen / weights.sum(-1)), atol=1e-5)
    assert "add up to 1.0000" in check_normalization(model, ids[0], excluded)


def test_a_split_scores_better_without_them_and_a_text_of_another_encoding_is_refused(
    shard_folder: Path, tmp_path: Path
):
    torch.manual_seed(0)
    model = Transformer(TINY).eval()
    module = TokenData(Shards(str(shard_folder)), 256, 32, vocab_size=300, evaluation=CONFIG)
    module.setup("validate")
    scores = [
        score(model.nll, module.val_tokens, module.table, CONFIG, excluded=excluded)
        for excluded in (None, module.excluded)
    ]
    assert scores[1].loss < scores[0].loss
    assert scores[1].bytes == scores[0].bytes
    tokenizer = load_tokenizer(shard_folder / "tokenizer.model")
    a, b = (int(each) for each in excluded_pairs(tokenizer).nonzero()[0])
    for path in shard_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    never = np.array([BOS, *[a, b] * 40], dtype=np.uint16)
    refusal = r"but BPE with this tokenizer never does; set --eval\.canonical false"
    write_shard(tmp_path / "words_train_000002.bin", never)
    module = TokenData(Shards(str(tmp_path)), 256, 32, vocab_size=300, held_out_tokens=80, evaluation=CONFIG)
    with pytest.raises(UserError, match=rf"words_train_000002\.bin: .*{refusal}"):
        module.setup("fit")
    write_shard(tmp_path / "words_val_000000.bin", never)
    module = TokenData(Shards(str(tmp_path)), 256, 32, vocab_size=300, evaluation=CONFIG)
    with pytest.raises(UserError, match=rf"words_val_000000\.bin: .*{refusal}"):
        module.setup("validate")
