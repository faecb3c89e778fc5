"""A process of several that dies ends the run soon, and its checkpoint resumes with another number of processes."""

import time
from pathlib import Path

import pytest

from tests.helpers import RUNS, run_faulty, score_of, small, trainer
from trainer.checkpoint import load_checkpoint

TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--checkpoints.every=2", "--precision=64-true"]


@pytest.mark.parametrize(("rank", "how", "saved"), [(1, "SIGKILL", 4), (0, "error", 5)])
def test_a_process_that_ends_takes_the_run_down_and_leaves_a_checkpoint(
    rank: int, how: str, saved: int, tmp_path: Path, shard_folder: Path
):
    started = time.monotonic()
    fault = {"how": how, "step": 5, "rank": rank}
    result = run_faulty("end_a_process", fault, *small(shard_folder, *TWO), cwd=tmp_path)
    assert result.returncode != 0
    assert time.monotonic() - started < 60
    if how == "error":
        assert "planted" in result.stderr
    else:
        assert "rank" in result.stderr.lower()
    checkpoint = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert checkpoint["global_step"] >= saved
    if how == "error":
        return
    alone = trainer(*small(shard_folder, "--precision=64-true"), "--ckpt=last", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    whole = trainer(*small(shard_folder, "--precision=64-true"), cwd=tmp_path)
    assert score_of(alone.stdout)["val_bpb"] == pytest.approx(score_of(whole.stdout)["val_bpb"], abs=1e-7)


@pytest.mark.parametrize(("rank", "name", "code"), [(0, "SIGINT", 130), (1, "SIGTERM", 143)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    rank: int, name: str, code: int, tmp_path: Path, shard_folder: Path
):
    fault = {"how": name, "step": 5, "rank": rank}
    result = run_faulty("end_a_process", fault, *small(shard_folder, *TWO), cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    checkpoint = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 6  # the step that the signal came in


@pytest.mark.parametrize("where", ["validation_step", "nll_of"])  # the second: where the export scores
def test_a_signal_to_all_outside_of_steps_ends_them_at_once(where: str, tmp_path: Path, shard_folder: Path):
    step = 4 if where == "validation_step" else 8
    started = time.monotonic()
    fault = {"how": "SIGTERM", "step": step, "where": where}
    result = run_faulty("end_a_process", fault, *small(shard_folder, *TWO), cwd=tmp_path)
    assert result.returncode == 143, result.stderr
    assert time.monotonic() - started < 60
    folder = tmp_path / RUNS / "1"
    assert load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == step
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_processes_report_a_lost_one_in_one_line(rank: int, tmp_path: Path, shard_folder: Path):
    started = time.monotonic()
    fault = {"how": "SIGKILL", "step": 5, "rank": rank}
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    result = run_faulty("end_a_process", fault, *small(shard_folder, *TWO), cwd=tmp_path, launcher=launcher)
    assert result.returncode != 0
    assert time.monotonic() - started < 60
    assert "another process of this run has ended" in result.stderr
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] >= 4


def test_a_model_over_the_cap_ends_all_processes(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, *TWO, "--export.cap=1000"), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("over the cap of 1,000") == 1
