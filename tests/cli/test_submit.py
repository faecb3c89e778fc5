"""A submission proves itself in a clean process, and what must not ship is refused."""

import json
import os
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers import RUNS, small, trainer
from trainer.__main__ import main
from trainer.data.manifest import Manifest
from trainer.source_bundle import script_of, source_bundle, sources_of
from trainer.submission import folder as submission_folder

WHO = [
    "--name",
    "Small & quick",
    "--author",
    "Ada L.",
    "--github-id",
    "ada",
    "--track",
    "non-record",
    "--blurb",
    "A test.",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> list[Path]:
    """The same recipe with two seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in (42, 43):
        result = trainer(*small(shard_folder, f"--seed_everything={seed}"), cwd=folder)
        assert result.returncode == 0, result.stderr
    return [folder / RUNS / str(number) for number in (1, 2)]


def test_a_submission_holds_every_field_and_proves_its_score(
    runs: list[Path], shard_folder: Path, tmp_path: Path, capsys
):
    out, data = tmp_path / "submission", tmp_path / "shards"
    data.mkdir()
    for shard in shard_folder.glob("*.bin"):  # as those from the Hub, which have no tokenizer beside them
        (data / shard.name).symlink_to(shard)
    assert main(["submit", str(runs[0]), *WHO, "--data", str(data), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "in a clean process on the hardware and libraries of the run" in shown
    names = {
        "README.md",
        "submission.json",
        "train.log",
        "artifact.zst",
        "train_gpt.py",
        "requirements.txt",
        "config.yaml",
        "tokenizer.model",
    }
    assert {path.name for path in out.iterdir()} == names
    record, summary = (json.loads(path.read_text()) for path in (out / "submission.json", runs[0] / "summary.json"))
    assert [record[key] for key in ("author", "github_id", "name", "blurb", "track")] == [
        "Ada L.",
        "ada",
        "Small & quick",
        "A test.",
        "non-record",
    ]
    assert record["val_bpb"] == summary["val_bpb"]
    assert record["bytes_total"] == sum((out / name).stat().st_size for name in ("artifact.zst", "train_gpt.py"))
    assert record["seeds"] == [42]
    assert {
        "date",
        "val_loss",
        "bytes_model",
        "bytes_code",
        "steps",
        "wallclock_seconds",
        "hardware",
        "versions",
    } < set(record)
    assert record["eval_time_seconds"] == summary["eval_seconds"]
    log = (out / "train.log").read_text()
    assert "training " in log
    assert f"val_bpb={summary['val_bpb']:.8f}" in log
    readme = (out / "README.md").read_text()
    assert f"{summary['val_bpb']:.5f}" in readme
    assert f"torch=={summary['versions']['torch'].partition('+')[0]}" in (out / "requirements.txt").read_text()


def test_a_run_of_two_processes_can_be_submitted(shard_folder: Path, tmp_path: Path):
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
    result = trainer(*small(shard_folder, *two), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / RUNS / "1"
    assert main(["submit", str(run), *WHO, "--data", str(shard_folder), "--out", str(tmp_path / "out")]) == 0


def test_a_manifest_of_another_program_may_lack_the_class_of_its_source(runs: list[Path], tmp_path: Path):
    Manifest({}, "", [], {}, 0, {}).write(tmp_path)
    submission_folder.make_folder(submission_folder.Entry("n", "a", "i", "t", ""), runs[:1], tmp_path, tmp_path / "out")
    assert "is a copy" not in (tmp_path / "out/README.md").read_text()


def test_the_script_gives_its_sources_back():
    script = source_bundle()
    compile(script, "train_gpt.py", "exec")
    sources = sources_of(script)
    assert sources["trainer/errors.py"] == (ROOT / "trainer/errors.py").read_bytes()
    assert sources["trainer/configs/quickstart.yaml"] == (ROOT / "configs/quickstart.yaml").read_bytes()
    assert script == source_bundle()


def test_several_seeds_make_one_submission(runs: list[Path], shard_folder: Path, tmp_path: Path):
    out = tmp_path / "submission"
    resumed = shutil.copytree(runs[1], tmp_path / "resumed")
    config = yaml.safe_load((resumed / "config.yaml").read_text())
    (resumed / "config.yaml").write_text(yaml.safe_dump({**config, "ckpt": "last", "report": {"enabled": False}}))
    runs = [runs[0], resumed]
    assert main(["submit", *map(str, runs), *WHO, "--data", str(shard_folder), "--out", str(out)]) == 0
    record = json.loads((out / "submission.json").read_text())
    scores = [json.loads((run / "summary.json").read_text())["val_bpb"] for run in runs]
    assert record["val_bpb"] == pytest.approx(sum(scores) / 2)
    assert record["val_bpb_deviation"] == pytest.approx(statistics.stdev(scores))
    assert {seed: row["val_bpb"] for seed, row in record["per_seed"].items()} == {"42": scores[0], "43": scores[1]}
    assert {"train_seed42.log", "train_seed43.log"} < {path.name for path in out.iterdir()}
    best = runs[scores.index(min(scores))]
    assert (out / "artifact.zst").read_bytes() == (best / "artifact.zst").read_bytes()


def test_what_must_not_ship_is_refused(runs: list[Path], shard_folder: Path, tmp_path: Path, capsys, monkeypatch):
    def refused(*words: str) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(["submit", *words, *WHO, "--out", str(tmp_path / "out"), "--data", str(shard_folder)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()  # nothing unproved remains
        return error

    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    assert "have the same seed" in refused(str(runs[0]), str(copy))
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "shards_fingerprint": "0" * 16}))
    assert "read other shards than" in refused(str(runs[1]), str(copy))
    (copy / "summary.json").write_text(json.dumps(summary))
    script = {"name": "mine.py", "sha256": "1"}
    (copy / "summary.json").write_text(json.dumps({**summary, "script": script}))
    assert "ran with your own mine.py, which the code that ships lacks" in refused(str(copy))
    (copy / "summary.json").write_text(json.dumps(summary))
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("matrix_lr: 0.02", "matrix_lr: 0.03"))
    assert "has another recipe than" in refused(str(runs[1]), str(copy))
    (copy / "summary.json").write_text(json.dumps({**summary, "val_bpb": summary["val_bpb"] - 0.01}))
    assert "give the --data that the run was scored on" in refused(str(copy))
    (copy / "train_gpt.py").write_bytes(b"raise SystemExit('broken')")
    assert "is not a script of this trainer that compiles" in refused(str(copy))
    files = {"trainer/__init__.py": b"", "trainer/__main__.py": b"import absent"}
    (copy / "train_gpt.py").write_bytes(script_of(files))
    assert "requirements.txt: lacks absent, which the code imports" in refused(str(copy))
    files["trainer/__main__.py"] = b"def main(): raise SystemExit('broken')"
    (copy / "train_gpt.py").write_bytes(script_of(files))
    assert "its own code cannot score its artifact: broken" in refused(str(copy))
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        error = refused(str(runs[0]))
        assert "out.unproved/artifact.zst: cannot be written (No space left on device); free some space" in error
    (copy / "artifact.zst").unlink()
    assert "the run did not end with an export" in refused(str(copy))
    assert "holds no finished run" in refused(str(tmp_path))
    monkeypatch.setattr(submission_folder, "SIZE_CAP", 1000)
    assert "over the cap of 1,000; export it with --shrink_to_cap" in refused(str(runs[0]))
    (tmp_path / "out").mkdir()
    monkeypatch.undo()
    assert main(["submit", str(runs[0]), *WHO, "--out", str(tmp_path / "out"), "--data", str(shard_folder)]) == 1
    assert "exists already; choose another --out" in capsys.readouterr().err
