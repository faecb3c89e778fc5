"""`trainer inspect` of a model file, against an independent reader of the format and Shannon's formula."""

import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.read_artifact import read
from tests.conftest import ROOT
from trainer.__main__ import main
from trainer.quantize.container import read_container

GOLDEN = ROOT / "tests/golden/0.1.0"


def inspected(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, args)]) == 0
    return capsys.readouterr().out


def rows_of(shown: str) -> dict[tuple[str, str], tuple[int, int, float]]:
    """Count, parameters and bits of each parameter, by the name and kind of a row."""
    lines = shown.partition("bits each\n")[2].partition("\n\n")[0].splitlines()
    cells = [re.split(r" {2,}", line) for line in lines]
    return {(cell[0], cell[1]): (int(cell[-3]), int(cell[-2].replace(",", "")), float(cell[-1])) for cell in cells}


@pytest.mark.parametrize("name", ["nearest.zst", "loss_aware.zst"])
def test_the_tensors_of_an_artifact_are_those_of_another_reader(name: str, capsys):
    header, tensors = read(GOLDEN / name)
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in header["tensors"]:
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", entry["name"]), entry["kind"]), []).append(entry["name"])
    groups["all", str(len(tensors))] = list(tensors)
    rows = rows_of(inspected(capsys, GOLDEN / name))
    assert rows.keys() == groups.keys()
    for row, names in groups.items():
        parameters = sum(tensors[each].size for each in names)
        bits = sum(bits_of(name, each) for each in names)
        assert rows[row][:2] == (len(names), parameters)
        assert rows[row][2] == pytest.approx(bits / parameters, abs=0.006)


def bits_of(name: str, tensor: str) -> float:
    """Shannon's entropy of every stream of bytes: symbols, exponents of columns, first and second bytes of floats."""
    stored = read_container(GOLDEN / name)[1][tensor]
    parts = [stored.values, *(part for part in (stored.scale, stored.columns) if part is not None)]
    halves = [part.tobytes() if part.dtype == np.int8 else part.astype("<f2").tobytes() for part in parts]
    steps = [1 if part.dtype == np.int8 else 2 for part in parts]
    streams = [half[start::step] for half, step in zip(halves, steps, strict=True) for start in range(step)]
    return sum(-count * math.log2(count / len(each)) for each in streams for count in Counter(each).values())


def test_the_tokenizer_beside_it_is_compared(tmp_path: Path, capsys):
    model = shutil.copy(GOLDEN / "nearest.zst", tmp_path)
    assert "tokenizer.model is missing" in inspected(capsys, model)
    shutil.copy(GOLDEN / "shards/tokenizer.model", tmp_path)
    assert "tokenizer.model is the same" in inspected(capsys, model)
    (tmp_path / "other.model").write_bytes(b"x")
    assert "other.model is another one" in inspected(capsys, model, "--tokenizer", tmp_path / "other.model")


def test_the_folder_of_a_run_shows_its_artifact_or_else_its_checkpoint(tmp_path: Path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for file, name in (("step.ckpt", "checkpoints/last.ckpt"), ("nearest.zst", "artifact.zst")):
        shutil.copy(GOLDEN / file, tmp_path / name)
        assert inspected(capsys, tmp_path) == inspected(capsys, tmp_path / name)


def test_a_checkpoint_shows_its_step_and_its_tensors(capsys):
    shown = inspected(capsys, GOLDEN / "step.ckpt", "--tokenizer", GOLDEN / "shards/tokenizer.model")
    checkpoint = torch.load(GOLDEN / "step.ckpt", weights_only=True)
    assert f"checkpoint after step {checkpoint['global_step']} of " in shown
    assert f"vocab_size: {checkpoint['golf_trainer']['model']['vocab_size']}\n" in shown
    numbers = sum(value.numel() for key, value in checkpoint["state_dict"].items() if key.startswith("model."))
    (total,) = (row for (name, _), row in rows_of(shown).items() if name == "all")
    assert total[1:] == (numbers, 32.0)
    assert "tokenizer.model is the same" in shown


@pytest.mark.parametrize(("option", "value"), [("--documents", "-1"), ("--tokenizer", "nowhere.model")])
def test_a_bad_option_is_refused_in_one_line(option: str, value: str, capsys):
    assert main(["inspect", str(GOLDEN / "nearest.zst"), option, value]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line
    assert value in line


@pytest.mark.parametrize("content", [b"", b"GOLFLM03", b"PK but no checkpoint", b"some text"])
def test_any_other_file_is_refused_in_one_line(content: bytes, tmp_path: Path, capsys):
    (tmp_path / "file").write_bytes(content)
    assert main(["inspect", str(tmp_path / "file")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
