"""The card beside a stored model: every fact is the run's, and a score only where the file has it."""

import json
import math
from pathlib import Path

import pytest
import yaml

from trainer.evaluation.per_document import write_csv
from trainer.model_card import write_model_card
from trainer.run_folder import RunFolder

SUMMARY = {
    "parameters": 417101,
    "bytes_model": 411061,
    "stages": {
        "averaged_plain": {"bpb": 1.93214, "loss": 3.0, "tokens": 1000, "bytes": 2222},
        "artifact_sliding": {"bpb": 1.91732, "loss": 3.0, "tokens": 1000, "bytes": 2222},
    },
    "text_fingerprint": "78ef6d5f363d45d6",
    "shards_fingerprint": "5beb030898316def",
    "tokenizer_sha256": "c0592792",
    "train_tokens": 2031616,
    "epochs": 0.5047,
    "train_seconds": 210.2,
    "steps": 992,
    "weights": "averaged",
    "val_bytes": 2222,
    "val_bpb": 1.91732,
    "versions": {"device": "NVIDIA H200"},
    "ancestry": [{"file": "/home/somebody/runs/parent/artifact.zst", "sha256": "0123abcd"}],
}
SOURCE = {"class_path": "trainer.data.sources.LocalText", "init_args": {"folder": "/home/somebody/data/mine"}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "quickstart/7")
    folder.path.mkdir(parents=True)
    folder.summary.write_text(json.dumps(SUMMARY))
    settings = {"data": {"source": SOURCE, "sequence_length": 128}, "eval": {"window": 128, "stride": 32}}
    folder.config.write_text(yaml.safe_dump(settings | {"wallclock": {"seconds": 210.0}}))
    return folder


def card(run: RunFolder, **options) -> str:
    write_model_card(run.path, run, options.pop("summary", SUMMARY), **options)
    return run.card.read_text()


def test_a_card_says_what_the_run_says(run: RunFolder):
    text = card(run)
    assert "# quickstart, run 7\n" in text
    assert "417,101 parameters in 411,061 bytes, trained further on another text" in text
    assert "| this file, sliding windows | 1.9173 | 1,000 | 2,222 |" in text
    assert "Windows have 128 tokens. Sliding ones move by 32." in text
    for row in (
        "| text | LocalText, folder `mine` |",
        "| text, fingerprint | `78ef6d5f363d45d6` |",
        "| tokens read | 2,031,616, 0.50 epochs |",
        "| training time | 210 s for 992 steps |",
        "| device | NVIDIA H200 |",
        "| started from | `artifact.zst`, sha256 `0123abcd` |",
        "| budget | 210.0 s |",
        "| context | 128 tokens |",
    ):
        assert row in text
    assert "It has read only this text and that of the model it started from, " in text
    assert "somebody" not in text  # a path is a machine's own
    front = next(yaml.safe_load_all(text.split("\n#")[0]))
    assert front["pipeline_tag"] == "text-generation"


def test_a_card_says_that_its_scores_are_canonical(run: RunFolder):
    write_model_card(run.path, run, SUMMARY)
    assert "eval.canonical" not in (run.path / "README.md").read_text()
    settings = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**settings, "eval": {**settings.get("eval", {}), "canonical": True}}))
    write_model_card(run.path, run, SUMMARY)
    assert "have no probability (`eval.canonical`)" in (run.path / "README.md").read_text()


def test_the_score_by_source_sums_its_documents(run: RunFolder):
    write_csv(run.documents, ["a", "b", "a", "c"], "", [3, 4, 5, 1], [10, 20, 30, 0], [1.0, 2.0, 6.0, 0.5])
    same = {**SUMMARY, "val_bytes": 60, "val_bpb": 9.5 / math.log(2) / 60}
    text = card(run, summary=same)
    assert "| a | 0.2525 | 2 | 40 |" in text  # 7 nats / ln 2 / 40 bytes
    assert "| b | 0.1443 | 1 | 20 |" in text
    assert "| c |" not in text  # it has no bytes
    for other in ({"val_bytes": 61}, {"val_bpb": 0.3}):  # another text, other weights
        assert "By source" not in card(run, summary=same | other)
    run.documents.write_text("of another program\n")
    assert "By source" not in card(run, summary=same)


def test_names_cannot_break_the_page_and_a_changed_summary_makes_no_card(run: RunFolder):
    run.config.write_text(run.config.read_text().replace("data/mine", "data/a|b`c"))
    assert "| text | LocalText, folder `a/b'c` |" in card(run)
    run.card.unlink()
    for change in ({"bytes_model": "many"}, {"ancestry": ["x"]}, {"stages": 5}):
        write_model_card(run.path, run, SUMMARY | change)
        assert not run.card.exists()


def test_a_readme_of_somebody_else_is_kept(run: RunFolder):
    run.card.write_text("# My project\n")
    assert card(run) == "# My project\n"


def test_weights_that_were_not_scored_have_no_score(run: RunFolder):
    for text in (card(run, is_scored=False), card(run, summary={})):
        assert "These weights were not scored" in text
        assert "1.9" not in text
    assert "A small language model." in card(run, summary={})
    run.config.write_text("[not, settings]")
    assert "LocalText" not in card(run)


def test_files_for_other_programs_are_not_said_to_be_an_artifact(run: RunFolder):
    text = card(run, summary={**SUMMARY, "ancestry": []}, open_format=True)
    assert "artifact.zst" not in text
    assert "411,061" not in text
    assert "| the artifact, sliding windows | 1.9173 |" in text
    assert "It has read only this text, " in text
