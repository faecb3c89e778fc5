"""The benchmark behind the published step times runs to its end, and times what it says."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import train_step
from tests.helpers import small


def test_it_times_steps_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    options = [each for each in small(shard_folder) if each.startswith(("--model.", "--data."))]
    monkeypatch.setattr(sys, "argv", ["train_step", "--steps=2", "--data.source=trainer.data.sources.Shards", *options])
    train_step.main()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    figures = json.loads(line)
    (batch,) = (int(each.partition("=")[2]) for each in options if each.startswith("--data.batch_tokens="))
    assert figures["tokens_per_second"] == pytest.approx(batch / (figures["step_ms"] / 1000), rel=0.01)
    assert figures["attention"]
    assert figures["last_loss"] != figures["first_loss"]
