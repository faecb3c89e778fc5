"""Sprints compare only like with like, and the table groups seeds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sprint import Budget, read_table, table
from tests.conftest import ROOT, TINY_OPTIONS
from trainer.data.manifest import Manifest, ShardRecord
from trainer.errors import UserError
from trainer.files import sha256_of


def row(config: str, seed: int, bpb: float, **more: object) -> dict:
    stages = {"live_plain": bpb + 0.03, "artifact_plain": bpb + 0.01, "artifact_sliding": bpb}
    common = {"steps": 100, "train_tokens": 2_000_000, "train_seconds": 2.0, "bytes_total": 15_900_000 + seed}
    return {
        "config": config,
        "settings": [],
        "seed": seed,
        "seconds": 300.0,
        "text_fingerprint": "a" * 16,
        "val_bpb": bpb,
        "stages": stages,
        **common,
        **more,
    }


def test_rows_of_another_text_or_another_time_are_refused(tmp_path: Path):
    path = tmp_path / "sprints.jsonl"
    assert read_table(path, "a" * 16, Budget(300.0)) == []
    path.write_text(json.dumps(row("r", 1, 1.3)) + "\n")
    assert len(read_table(path, "a" * 16, Budget(300.0))) == 1
    with pytest.raises(UserError, match="row 1 saw the text a"):
        read_table(path, "b" * 16, Budget(300.0))
    with pytest.raises(UserError, match="row 1 trained for 300 s"):
        read_table(path, "a" * 16, Budget(150.0))
    with pytest.raises(UserError, match="row 1 trained for 300 s, this run would for 750 steps"):
        read_table(path, "a" * 16, Budget(max_steps=750))
    with pytest.raises(UserError, match="row 1 has the score of an artifact, this run would have that of weights"):
        read_table(path, "a" * 16, Budget(300.0), has_artifact=False)
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="is not a table of sprints"):
        read_table(path, "a" * 16, Budget(300.0))


def test_the_table_has_means_deviations_and_changes():
    rows = [row("r", 1, 1.30), row("r", 2, 1.32), row("r", 1, 1.25, settings=["model.mlp.ratio=4"])]
    first, second = table(rows).splitlines()[2:]
    assert first.startswith("| r | 2 | 100 | 1.000 | 1.3400 |  | 1.3200 | **1.3100** ± 0.0141 | +0.0000 | 15,900,002 |")
    assert second.startswith("| r model.mlp.ratio=4 | 1 |")
    assert "| -0.0600 |" in second


def test_rows_without_an_artifact_have_no_size():
    weights = {"live_plain": 1.31, "averaged_plain": 1.30}
    rows = [row("r", seed, 1.30, stages=weights) for seed in (1, 2)]
    for each in rows:
        del each["bytes_total"]
    assert (
        table(rows).splitlines()[2] == "| r | 2 | 100 | 1.000 | 1.3100 | 1.3000 |  | **1.3000** ± 0.0000 | +0.0000 |  |"
    )


def sprint(data: Path, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    args = ["--config=int5mlp_10l", "--table=t.jsonl", "--steps=4", f"--data={data}", "--seeds=2"]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.sprint", *args, "--set", *settings],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_sprint_runs_its_seeds_and_adds_their_rows(tmp_path: Path, shard_folder: Path):
    settings = [option.removeprefix("--") for option in [*TINY_OPTIONS, "--report.enabled=false"]]
    assert "holds no manifest.json" in sprint(shard_folder, tmp_path, *settings).stderr
    data = tmp_path / "data"
    shutil.copytree(shard_folder, data)
    shards = [ShardRecord(path.name, "train", 1, 1, 1, 7, path.name) for path in sorted(data.glob("*.bin"))]
    text = {"train": "1", "val": "2"}
    Manifest({}, sha256_of(data / "tokenizer.model"), shards, text, 0, {}).write(data)
    result = sprint(data, tmp_path, *settings)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["steps"], row["seconds"], row["max_steps"]) for row in rows] == [
        (1, 4, None, 4),
        (2, 4, None, 4),
    ]
    assert rows[0]["val_bpb"] != rows[1]["val_bpb"]
    assert f"**{(rows[0]['val_bpb'] + rows[1]['val_bpb']) / 2:.4f}** ±" in result.stdout
