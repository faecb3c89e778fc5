"""The list of runs and the removal of old ones, on folders with the files that a run writes."""

import csv
import json
import os
from pathlib import Path

import pytest

from tests.helpers import trainer_here
from trainer.lock import exclusive
from trainer.run_folder import RunFolder

STAGES = {"live_plain": {"bpb": 1.0, "loss": 1.0, "tokens": 3, "bytes": 9}}


def make_run(root: Path, name: str, age: float, bpb: float | None = None, **config: object) -> RunFolder:
    """A finished run with a score, else an interrupted one."""
    run = RunFolder(root / name)
    run.checkpoints.mkdir(parents=True)
    run.last_checkpoint.write_bytes(b"weights")
    run.checkpoint(1234).write_bytes(b"weights")
    run.config.write_text(json.dumps({"data": {"source": {"init_args": {"folder": "data/mine"}}}, **config}))
    if bpb is not None:
        numbers = dict.fromkeys(("val_loss", "val_tokens", "val_bytes", "epochs", "train_tokens"), 1)
        more = {
            "train_seconds": 1.0,
            "parameters": 5,
            "weights": "live",
            "versions": {"device": "cpu"},
            "text_fingerprint": None,
        }
        hashes = {"shards_fingerprint": "a", "tokenizer_sha256": "b"}
        sizes = {"bytes_total": 1000, "bytes_model": 900, "bytes_code": 100, "bytes_cap": 2000}
        summary = {**numbers, **sizes, **more, **hashes, "val_bpb": bpb, "steps": 40, "stages": STAGES}
        run.write_summary(summary)
        run.artifact.write_bytes(b"model")
    for path in run.path.rglob("*"):
        os.utime(path, (2e9 - age, 2e9 - age))
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make_run(root, "small/1", 50, 1.5)
    make_run(root, "small/2", 40, 1.25, init_from="runs/small/1/artifact.zst")
    make_run(root, "small/3", 30)
    make_run(root, "small/4", 20, 1.4)
    make_run(root, "large/1", 10, 1.1)
    failed = RunFolder(root / "large/2")
    failed.path.mkdir()
    failed.log.write_text("training\n")
    os.utime(failed.log, (2e9 - 60, 2e9 - 60))
    (root / "large/notes").mkdir()  # no run
    return root


def listed(cwd: Path, *args: str) -> list[list[str]]:
    result = trainer_here("runs", *args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[2:]]


def test_runs_are_listed_with_their_state_and_score(root: Path, tmp_path: Path):
    rows = listed(tmp_path)
    assert [row[0] for row in rows] == [
        f"runs/{name}" for name in "large/1 small/4 small/3 small/2 small/1 large/2".split()
    ]
    assert [row[1] for row in rows] == ["finished", "finished", "interrupted", "finished", "finished", "failed"]
    assert rows[0][2:6] == ["data/mine", "40", "1.1000", "1,000"]
    assert rows[2][2:6] == ["data/mine", "1,234", "", ""]  # of an interrupted one, those of its newest checkpoint
    assert [row[4] for row in listed(tmp_path, "--sort=bpb", "--state=finished")] == [
        "1.1000",
        "1.2500",
        "1.4000",
        "1.5000",
    ]
    assert [row[0] for row in listed(tmp_path, "--recipe=large", "--sort=name")] == ["runs/large/1", "runs/large/2"]
    with exclusive(root / "small/3/.training", "training"):
        assert listed(tmp_path, "--state=running")[0][0] == "runs/small/3"
    refused = trainer_here("runs", "--csv=runs/small/1/artifact.zst", cwd=tmp_path)
    assert (refused.returncode, "choose a name that ends in .csv" in refused.stderr) == (1, True)
    assert trainer_here("runs", "--csv=all.csv", cwd=tmp_path).stdout == "6 runs in all.csv\n"
    with (tmp_path / "all.csv").open() as file:
        table = [list(row.values()) for row in csv.DictReader(file)]
    assert [row[:3] + row[6:] for row in table] == [row[:3] + row[6:] for row in rows]
    assert table[0][3:6] == ["40", "1.1", "1000"]  # numbers for programs
    assert table[2][3:6] == ["1234", "", ""]


def test_prune_keeps_the_newest_and_what_another_run_needs(root: Path, tmp_path: Path):
    everything = sorted(root.rglob("*"))
    shown = trainer_here("runs", "prune", "--keep=1", "--dry_run", cwd=tmp_path)
    assert shown.stdout.endswith("would remove 4 runs (0.0 MB)\n")
    refused = trainer_here("runs", "prune", "--keep=1", cwd=tmp_path)
    assert "give --yes or --dry_run" in refused.stderr
    assert sorted(root.rglob("*")) == everything
    removed = trainer_here("runs", "prune", "--keep=3", "--yes", "--recipe=small", cwd=tmp_path)
    assert removed.stdout == "nothing to remove\n"  # run 2 began with the artifact of run 1
    removed = trainer_here("runs", "prune", "--keep=1", "--yes", cwd=tmp_path)
    assert removed.stdout.endswith("removed 4 runs (0.0 MB)\n")
    assert sorted(path.name for path in root.glob("*/*")) == ["1", "4", "notes"]


def test_prune_keeps_a_run_that_trains(root: Path, tmp_path: Path):
    with exclusive(root / "small/3/.training", "training"):
        assert trainer_here("runs", "prune", "--keep=1", "--yes", "--recipe=small", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in root.glob("small/*")) == ["3", "4"]


def test_prune_keeps_what_is_needed_from_wherever_it_is_called_and_follows_no_link(root: Path, tmp_path: Path):
    """The relative path in the config counts from the folder in which that run was started."""
    elsewhere = tmp_path / "elsewhere/other"
    make_run(elsewhere.parent, "other/7", 70, 2.0)
    (root / "linked").symlink_to(elsewhere)
    (root / "small/best").symlink_to("2")
    result = trainer_here("runs", "prune", "--keep=1", "--yes", f"--root={root}", cwd=tmp_path / "elsewhere")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in root.glob("small/*")) == [
        "1",
        "2",
        "4",
        "best",
    ]  # the link names 2, which needs 1
    (root / "small/best").unlink()
    make_run(root, "small/5", 5, 1.2, data={"source": {"init_args": {"tokenizer": "runs/small/1/tokenizer.model"}}})
    result = trainer_here("runs", "prune", "--keep=1", "--yes", "--root=.", cwd=root)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in root.glob("small/*")) == ["1", "5"]
    assert (elsewhere / "7/artifact.zst").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--root=nowhere"], "--root nowhere: there is no such folder"),
        (["prune", "--keep=1", "--sort=bpb"], "--csv and --sort belong to trainer runs list"),
        (["prune", "--keep=0"], "at least 1, not 0"),
        (["--keep=2"], "belong to trainer runs prune"),
    ],
)
def test_what_does_not_fit_is_refused(args: list[str], message: str, root: Path, tmp_path: Path):
    result = trainer_here("runs", *args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr


def test_the_version_names_the_commit(tmp_path: Path):
    assert trainer_here("--version", cwd=tmp_path).stdout.startswith("trainer 0.1.0")


def test_prune_needs_a_number(root: Path, tmp_path: Path):
    result = trainer_here("runs", "prune", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "trainer runs: prune needs --keep" in result.stderr
