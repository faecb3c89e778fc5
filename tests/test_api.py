"""The project from Python: the same results as the commands, as plain objects."""

import gc
import math
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import sentencepiece
import torch

import trainer
from tests.conftest import make_documents
from tests.helpers import trainer_here
from trainer.checkpoint import METADATA_KEY
from trainer.data.canonical import excluded_pairs
from trainer.data.sources import Shards
from trainer.data.tokenizer import ByteTable, load_tokenizer
from trainer.datamodule import TokenData
from trainer.errors import UserError
from trainer.evaluation import sliding
from trainer.evaluation.windows import EvaluationConfig
from trainer.lightning_module import LanguageModel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_overrides) -> trainer.TrainedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        result = trainer.fit("int5mlp_10l_parity", tiny_overrides)
        return result._replace(run_folder=result.run_folder.absolute())


def test_fit_returns_what_the_run_folder_holds(run: trainer.TrainedRun):
    assert run.run_folder.parts[-3:] == ("runs", "int5mlp_10l_parity", "1")
    assert set(run.scores) == {"live_plain", "averaged_plain", "artifact_plain", "artifact_sliding"}
    assert run.val_bpb == run.scores["artifact_sliding"].bpb == run.summary["val_bpb"]
    files = (run.run_folder / name for name in ("artifact.zst", "train_gpt.py"))
    assert run.bytes_total == sum(file.stat().st_size for file in files)
    assert "max_steps: 8" in (run.run_folder / "config.yaml").read_text()


def test_validate_scores_the_same_again_and_takes_overrides(
    run: trainer.TrainedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(run.run_folder.parents[2])
    again = trainer.validate(run.run_folder / "artifact.zst")
    assert again.scores == {"plain": run.scores["artifact_plain"], "sliding": run.scores["artifact_sliding"]}
    assert again.val_bpb == run.val_bpb
    capsys.readouterr()
    assert trainer.validate(run.run_folder / "artifact.zst", quiet=True) == again
    assert capsys.readouterr() == ("", "")
    plain = trainer.validate(run.run_folder / "artifact.zst", {"eval.stride": None})
    assert (plain.val_bpb, list(plain.scores)) == (run.scores["artifact_plain"].bpb, ["plain"])
    checkpoint = run.run_folder / "checkpoints/last.ckpt"
    averaged = trainer.validate(checkpoint, {"weights": "averaged", "eval.stride": None})
    assert averaged.scores["plain"].bpb == pytest.approx(run.scores["averaged_plain"].bpb, rel=1e-6)


@pytest.fixture(scope="module")
def without_bytes(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer that cannot spell every character."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    sentences, special = iter(make_documents(200, 2)), {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(path.with_suffix("")), vocab_size=40, minloglevel=4, **special
    )
    return load_tokenizer(path)


def test_texts_are_scored_as_validation_scores_a_split(
    run: trainer.TrainedRun, without_bytes: sentencepiece.SentencePieceProcessor, tmp_path: Path
):
    model, tokenizer = trainer.load_artifact(run.run_folder / "artifact.zst")
    documents = make_documents(40, 1)  # what the validation shard was made of
    ids = [token for text in documents for token in (tokenizer.bos_id(), *tokenizer.encode(text))]
    first = tokenizer.decode(ids[1:10])  # as long as a text that is one document
    assert trainer.score(model, tokenizer, [first], 32, 8).tokens == len(tokenizer.encode(first))
    score = trainer.score(model, tokenizer, documents, 32, 8, 16)
    assert score.bytes == sum(len(text.encode()) for text in documents)
    table = ByteTable.from_tokenizer(tokenizer)
    tokens = torch.tensor(ids, dtype=torch.int32)
    with torch.no_grad():
        assert score == sliding.score(model.nll, tokens, table, EvaluationConfig(32, 8, 16))
        excluded = excluded_pairs(tokenizer)
        canonical = sliding.score(model.nll, tokens, table, EvaluationConfig(32, 8, 16), excluded=excluded)
        assert trainer.score(model, tokenizer, documents, 32, 8, 16, canonical=True) == canonical
        assert canonical.loss < score.loss
        cut = sliding.score(model.nll, tokens, table, EvaluationConfig(32, 8, 16, max_tokens=300))
    assert cut == pytest.approx(run.scores["artifact_sliding"], rel=1e-6)  # of the shards with the same documents
    one = trainer.score(model, tokenizer, documents[0])
    assert one.bytes == len(documents[0].encode())
    assert one.tokens == len(tokenizer.encode(documents[0]))
    assert one.bpb == pytest.approx(one.loss * one.tokens / math.log(2) / one.bytes)
    for text in ("a \u2603", ["one", "a \u2603"]):  # a snowman, which a tokenizer without bytes does not know
        with pytest.raises(trainer.UserError, match=r"texts\[[01]\]: a document has 5 bytes, but its tokens stand "):
            trainer.score(model, without_bytes, text, 32, 8)
    for nothing in ([], [""], [" "]):
        with pytest.raises(trainer.UserError, match="no text to score"):
            trainer.score(model, tokenizer, nothing)
    with pytest.raises(trainer.UserError, match=r"eval\.stride must be at most eval\.window"):
        trainer.score(model, tokenizer, "a text", window=8, stride=9)


def test_generate_writes_what_the_command_writes(run: trainer.TrainedRun, tmp_path: Path):
    artifact = run.run_folder / "artifact.zst"
    model, tokenizer = trainer.load_artifact(artifact)
    text = trainer.generate(model, tokenizer, "the model", tokens=20, seed=3)
    args = ["--artifact", str(artifact), "--prompt", "the model", "--tokens", "20", "--seed", "3"]
    assert trainer_here("generate", *args, cwd=tmp_path).stdout == f"the model{text}\n"
    with pytest.raises(trainer.UserError, match="top_p must be above 0"):
        trainer.generate(model, tokenizer, top_p=0)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("quickstartt", {}, "is neither a file nor one of the recipes"),
        ("quickstart", {"data.source.folder": ""}, "its value is empty"),
        ("quickstart", {"wallclock.seconds": -1}, "wallclock.seconds must be positive"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_one_line(recipe: str, overrides: dict[str, object], message: str, tmp_path):
    with pytest.raises(trainer.UserError, match=message) as error:
        trainer.fit(recipe, {"trainer.default_root_dir": tmp_path / "runs", **overrides})
    assert "\n" not in str(error.value)


def test_an_unknown_option_is_an_error_too(tmp_path: Path):
    with pytest.raises(trainer.UserError, match=r"^[^(]*max_stepz.*did you mean --trainer.max_steps[^(]*$"):
        trainer.fit("quickstart", {"trainer.max_stepz": 3, "trainer.default_root_dir": tmp_path})


def test_a_model_that_has_generated_scores_as_before(run: trainer.TrainedRun):
    model, tokenizer = trainer.load_artifact(run.run_folder / "artifact.zst")
    texts = make_documents(5, 2)
    before = trainer.score(model, tokenizer, texts)
    trainer.generate(model, tokenizer, "the model", tokens=5)
    assert trainer.score(model, tokenizer, texts) == before


def test_a_run_leaves_nothing_behind_in_the_process(run: trainer.TrainedRun):
    assert gc.get_freeze_count() == 0  # or its models would stay in memory for ever
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_lightnings_own_ways_without_our_data_or_sizes_say_what_to_use(tmp_path: Path):
    model = LanguageModel(vocab_size=300, num_layers=2, model_dim=32)
    checkpoint = {METADATA_KEY: {}, "state_dict": model.state_dict(), "pytorch-lightning_version": pl.__version__}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"use trainer\.load_artifact"):
        LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", vocab_size=300, num_layers=2, model_dim=32)
    loader = torch.utils.data.DataLoader(torch.zeros(4, 17, dtype=torch.int32))
    bare = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(UserError, match=r"datamodule=TokenData"):
        bare.fit(model, train_dataloaders=loader)


def test_model_and_data_run_under_a_trainer_of_ones_own(shard_folder: Path):
    """As docs/extending.md says."""
    model = LanguageModel(vocab_size=300, num_layers=2, model_dim=32)
    before = model.model.token_embedding.weight.clone()
    evaluation = EvaluationConfig(16, None, max_tokens=300)
    data = TokenData(Shards(str(shard_folder)), 128, 16, vocab_size=300, evaluation=evaluation)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    own = pl.Trainer(max_steps=3, use_distributed_sampler=False, enable_model_summary=False, **options)
    own.fit(model, datamodule=data)
    assert own.global_step == 3
    assert not torch.equal(model.model.token_embedding.weight, before)
    (scores,) = own.validate(model, datamodule=data, verbose=False)
    assert scores["val/bpb"] == pytest.approx(model.scores[-1].bpb)
