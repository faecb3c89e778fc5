"""What is shown of a run: its status as text, as JSON, in a bar; and the log of a run with a bar holds its lines."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers import RUNS, small, trainer, trainer_here
from trainer import progress_display
from trainer.logging import logger, logging_to, only_warnings
from trainer.progress_display import Bar, JsonLines, Lines, ProgressDisplay, TrainingStatus, open_display

STATUS = TrainingStatus(120, 12.5, 50.0, 37.5, 2.5, 1.5, 0.25, 123456.0, 0.4, 3.25)
LINE = "step    120    12.5/50 s  loss 2.5000  bpb 1.5000  lr x0.250    123,456 tok/s  MFU 40 %  3.2 GiB"


def terminal_of(width: int, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of this width as standard output."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console(file=terminal, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress_display, "Console", lambda: console)
    return terminal


def test_a_status_as_text_and_as_json(capsys):
    lines = open_display("lines", 1.0)
    lines.show(STATUS)
    lines.close()
    assert capsys.readouterr().out == LINE + "\n"
    display = open_display("json", 1.0)
    display.show(STATUS)
    logger.info("a note")
    display.close()
    status, note = map(json.loads, capsys.readouterr().out.splitlines())
    assert status["tokens_per_second"] == 123456.0
    assert note == {"note": "a note"}
    assert STATUS.fraction == 0.25


def test_a_closed_display_leaves_messages_as_they_are(capsys):
    quiet = open_display("quiet", 1.0)
    logger.info("hidden")
    logger.warning("shown")
    quiet.close()
    logger.info("after")
    assert capsys.readouterr().out == "warning: shown\nafter\n"


def test_every_display_is_quiet_while_the_console_shows_only_warnings(monkeypatch: pytest.MonkeyPatch):
    """As in trainer.fit(quiet=True), whose text is prepared before the run's own display opens."""
    terminal_of(80, monkeypatch)
    with only_warnings():
        display = open_display("auto", 1.0)
    assert type(display) is ProgressDisplay
    display.close()


def test_auto_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch):
    for mode, kind in (("auto", Lines), ("json", JsonLines), ("quiet", ProgressDisplay)):
        display = open_display(mode, 1.0)
        assert type(display) is kind
        display.close()
    terminal_of(80, monkeypatch)
    bar = open_display("auto", 1.0)
    assert type(bar) is Bar
    bar.close()


def test_a_bar_shows_everything_and_the_log_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(160, monkeypatch)
    with logging_to(tmp_path / "train.log"):
        bar = open_display("bar", 10.0)
        assert isinstance(bar, Bar)
        logger.info("training starts [here]")
        bar.show(STATUS)
        bar.update_task("validation", 1, 4)
        bar._bar.refresh()
        bar.update_task("validation", 4, 4)
        bar.update_task("scoring artifact_sliding", 1, 3)
        bar._bar.refresh()
        bar.close()
        logger.info("summary")
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
    assert (tmp_path / "train.log").read_text().splitlines() == ["training starts [here]", LINE, "summary"]


@pytest.mark.parametrize(
    ("width", "expected"), [(60, "38 s left  loss 2.5000"), (80, "loss 2.5000  bpb 1.5000"), (200, "3.2 GiB")]
)
def test_a_bar_in_a_narrow_terminal_shows_what_matters(width: int, expected: str, monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(width, monkeypatch)
    bar = open_display("bar", 1.0)
    assert isinstance(bar, Bar)
    bar.show(STATUS)
    bar._bar.refresh()
    bar.close()
    assert expected in terminal.getvalue()
    assert "25 %" in terminal.getvalue()
    assert "…" not in terminal.getvalue()


def test_the_bar_follows_a_terminal_that_changes_its_width(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(60, monkeypatch)
    bar = open_display("bar", 0.1)
    for width in (60, 200):
        bar._bar.console.width = width
        terminal.truncate(0)
        bar.show(STATUS)
        bar._bar.refresh()
        assert ("3.2 GiB" in terminal.getvalue()) == (width == 200)
    bar.close()


def test_validate_shows_how_far_it_is(tmp_path: Path, shard_folder: Path):
    assert trainer(*small(shard_folder), cwd=tmp_path).returncode == 0
    args = ["--progress.mode=json", "--progress.every_seconds=0", "--eval.batch_windows=4"]
    shown = trainer_here("validate", "--ckpt", f"{RUNS}/1/artifact.zst", *args, cwd=tmp_path).stdout
    tasks = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    for name in ("scoring plain", "scoring sliding"):
        last = [task for task in tasks if task["task"] == name][-1]
        assert last["done"] == last["total"] > 1


def test_a_quiet_run_prints_its_summary_only(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, "--progress.mode=quiet"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.splitlines()[:2] == ["", f"Run finished: {RUNS}/1"]
    assert "no average" not in result.stdout
    assert "learning rate" not in result.stdout


def test_a_summary_says_what_a_schedule_left_out(tmp_path: Path, shard_folder: Path):
    args = ["--model.schedule.warmdown_steps=80", "--averaging.start_frac=0.01", "--progress.mode=quiet"]
    result = trainer(*small(shard_folder, *args), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for part in ("no average, so the live weights count", "every 2 steps while", "below 0.01", "this run had 0"):
        assert part in result.stdout
    assert "falls from the first of 8 steps on, since model.schedule.warmdown_steps is 80" in result.stdout
