"""The notebook of examples/, run from its first cell to its last; only the length of its runs is cut."""

import csv
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.helpers import environment

NOTEBOOK = ROOT / "examples/first_run.ipynb"
SMALLER = '"data.batch_tokens": 1024, "data.source.max_bytes": 600000, "eval.max_tokens": 2000'
SHORTER = {
    '"wallclock.seconds": 60': f'"trainer.max_steps": 61, {SMALLER}',
    '"trainer.max_steps": 60': f'"trainer.max_steps": 4, {SMALLER}',
}


def test_the_notebook_is_stored_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for before, after in SHORTER.items():
        changed = [cell for cell in notebook.cells if before in cell.source]
        assert len(changed) == 1
        changed[0].source = changed[0].source.replace(before, after)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.validate(notebook)
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    score, size = re.search(r"(\d\.\d{4}) bits per byte, ([\d,]+) bytes", "\n".join(printed)).groups()
    assert 1 < float(score) < 8
    assert int(size.replace(",", "")) < 16_000_000
    with (tmp_path / "runs/quickstart/1/metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < losses[0] - 0.5
    report = next(output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output)
    for part in ("<svg", "Where the bytes went", "What it writes"):  # curve, bytes and samples
        assert part in report.data["text/html"]
    samples = [text for text in printed if text.startswith("Return the")]
    assert len(samples) == 1
    assert len(samples[0]) > len("Return the") + 10
    assert len(re.findall(r"bits per byte: ", "\n".join(printed))) == 2
    assert re.findall(r"mlp\.ratio (\d)", "\n".join(printed)) == ["3", "4"]
