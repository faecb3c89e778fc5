"""What is shown of a run: facts in words, in JSON, in a bar; and the log of a run with a bar holds its lines."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import ROOT  # noqa: F401 - one thread setting for all tests
from tests.test_end_to_end import RUN, small, trainer, trainer_here
from trainer import progress_view
from trainer.progress_display import Bar, TrainingStatus, JsonLines, Lines, Quiet, open_display
from trainer.logging import logging_to

FACTS = TrainingStatus(120, 12.5, 50.0, 37.5, 2.5, 1.5, 0.25, 123456.0, 0.4, 3.25)


def test_facts_in_words_and_as_json(capsys):
    Lines(1.0).show(FACTS)
    words = "step    120    12.5/50 s  loss 2.5000  bpb 1.5000  rate x0.250    123,456 tokens/s  40 % of peak  3.2 GiB"
    assert capsys.readouterr().out == words + "\n"
    JsonLines(1.0).show(FACTS)
    JsonLines(1.0).note("a note")
    facts, note = map(json.loads, capsys.readouterr().out.splitlines())
    assert facts["tokens_per_second"] == 123456.0
    assert note == {"note": "a note"}
    assert FACTS.share == 0.25


def test_auto_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch):
    assert type(open_display("auto", 1.0)) is Lines
    assert type(open_display("json", 1.0)) is JsonLines
    assert type(open_display("quiet", 1.0)) is Quiet
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    bar = open_display("auto", 1.0)
    assert type(bar) is Bar
    bar.close()


def test_a_bar_shows_everything_and_the_log_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(
        progress_view, "Console", lambda file: Console(file=file, force_terminal=True, width=160, color_system=None)
    )
    with logging_to(tmp_path / "train.log"):
        bar = open_display("bar", 10.0)
        bar.note("training starts [here]")
        bar.show(FACTS)
        bar.part("validation", 1, 4)
        bar._bar.refresh()
        bar.part("validation", 4, 4)
        bar.part("scoring artifact_sliding", 1, 3)
        bar._bar.refresh()
        bar.close()
        print("summary")
    shown = terminal.getvalue()
    for part in (
        "training starts [here]",
        "25 %",
        "loss 2.5000",
        "38 s left",
        "validation",
        "scoring artifact_sliding",
        "summary",
    ):
        assert part in shown
    log = (tmp_path / "train.log").read_text()
    assert log.splitlines() == ["training starts [here]", "  ".join(FACTS.words()), "summary"]


@pytest.mark.parametrize(
    ("width", "shown"), [(60, "38 s left  bpb 1.5000"), (80, "123,456 tokens/s"), (200, "3.2 GiB")]
)
def test_a_bar_in_a_narrow_terminal_shows_what_matters(width: int, shown: str):
    terminal = io.StringIO()
    bar = Bar(1.0, Console(file=terminal, force_terminal=True, width=width, color_system=None))
    bar.show(FACTS)
    bar._bar.refresh()
    bar.close()
    assert shown in terminal.getvalue()
    assert "25 %" in terminal.getvalue()
    assert "…" not in terminal.getvalue()


def test_validate_shows_how_far_it_is(tmp_path: Path, shard_folder: Path):
    assert trainer(*small(shard_folder, "--report.enabled=false"), cwd=tmp_path).returncode == 0
    words = ["--progress.mode=json", "--progress.every_seconds=0", "--eval.batch_windows=4"]
    shown = trainer_here("validate", "--ckpt", f"{RUN}/1/artifact.zst", *words, cwd=tmp_path).stdout
    parts = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    for name in ("scoring plain", "scoring sliding"):
        mine = [part for part in parts if part["part"] == name]
        assert mine[-1]["done"] == mine[-1]["total"] > 1


def test_a_quiet_run_prints_its_summary_only(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, "--progress.mode=quiet"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.splitlines()[:2] == ["", f"Run finished: {RUN}/1"]
