"""Runs that die, files that rot: what was saved is whole, and resuming from it ends with the same weights."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import make_documents
from tests.helpers import RUNS, digest, run_faulty, small, start_faulty, trainer, trainer_here
from trainer.checkpoint import METADATA_KEY, load_checkpoint, verify_checksum
from trainer.cli import train
from trainer.clock import TrainingClock
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import UserError

KILLS = int(os.environ.get("GOLF_KILLS", "3"))  # more of them take 4 seconds each


def long(shards: Path, *more: str) -> list[str]:
    return small(shards, "--trainer.max_steps=60", "--checkpoints.every=7", "--model.schedule.warmdown_steps=30", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    """A run of 60 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    result = trainer(*long(shard_folder), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / RUNS / "1/checkpoints"


def test_the_newest_checkpoints_stay_and_last_is_the_newest(whole: Path):
    assert sorted(path.name for path in whole.iterdir()) == ["last.ckpt", "step-000000056.ckpt", "step-000000060.ckpt"]
    assert os.path.samefile(whole / "last.ckpt", whole / "step-000000060.ckpt")


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(whole: Path, tmp_path: Path, shard_folder: Path):
    rng = random.Random()
    kills = 0
    while kills < KILLS:
        ckpt = ["--ckpt=last"] if list((tmp_path / RUNS).glob("*/checkpoints/*.ckpt")) else []
        with start_faulty("slow", {"step": 0.03}, *long(shard_folder), *ckpt, cwd=tmp_path) as process:
            assert process.stdout is not None
            if any(line.startswith("training ") for line in process.stdout):
                time.sleep(rng.uniform(0, 1.0))
                process.kill()
                kills += 1
            else:  # all steps were done already: again from the start
                assert process.wait() == 0
                newest = max(
                    (tmp_path / RUNS).glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns
                )
                assert digest(newest) == digest(whole / "last.ckpt")
                shutil.rmtree(tmp_path / "runs")
    resumed = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    if "start without --ckpt" in resumed.stderr:  # every kill came before the first save
        resumed = trainer(*long(shard_folder), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    newest = max((tmp_path / RUNS).glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert digest(newest) == digest(whole / "last.ckpt")


@pytest.mark.parametrize("end", ["update", "end", "next", "validation", 8, 12])
def test_the_metrics_of_a_resumed_run_are_those_of_one_that_nothing_stopped(
    end: str | int, tmp_path: Path, shard_folder: Path
):
    args = small(
        shard_folder,
        "--trainer.max_steps=20",
        "--trainer.log_every_n_steps=5",
        "--trainer.val_check_interval=6",
        "--model.schedule.warmdown_steps=1",
        "--checkpoints.every=1000",
    )
    assert trainer(*args, "--run_name=whole", cwd=tmp_path).returncode == 0
    args.append("--run_name=stopped")
    if isinstance(end, int):
        assert trainer(*args, f"--trainer.max_steps={end}", cwd=tmp_path).returncode == 0
    else:
        fault = {"moment": end, "step": 12 if end == "validation" else 8}
        assert run_faulty("signal_once", fault, *args, cwd=tmp_path).returncode == 138
    resumed = trainer(*args, "--ckpt=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole, stopped = (_metrics(tmp_path / RUNS / name) for name in ("whole", "stopped"))
    assert stopped == whole


def test_a_checkpoint_knows_the_losses_of_all_its_steps(tmp_path: Path, shard_folder: Path):
    """They are checked a step later."""
    args = small(shard_folder, "--checkpoints.every=3", "--checkpoints.keep=9", "--trainer.log_every_n_steps=1")
    assert trainer(*args, cwd=tmp_path).returncode == 0
    run = tmp_path / RUNS / "1"
    metrics = _metrics(run)
    losses = [float(metrics[str(step), "train/loss"]) for step in range(8)]
    for step in (3, 6, 8):
        state = load_checkpoint(run / f"checkpoints/step-{step:09d}.ckpt")["callbacks"]["StabilityMonitor"]
        assert state["losses"] == pytest.approx(losses[:step])
        assert state["skipped"] == 0


def test_the_time_of_the_last_validation_is_resumed(tmp_path: Path, shard_folder: Path):
    args = small(shard_folder, "--checkpoints.every=3", "--checkpoints.keep=9")
    assert trainer(*args, cwd=tmp_path).returncode == 0
    files = [tmp_path / RUNS / f"1/checkpoints/step-{step:09d}.ckpt" for step in (3, 6)]
    before, after = (load_checkpoint(file)[METADATA_KEY]["validated_at"] for file in files)
    assert before == 0 < after  # validated at step 4
    assert trainer(*args, "--trainer.val_check_interval=100", f"--ckpt={files[1]}", cwd=tmp_path).returncode == 0
    resumed = load_checkpoint(tmp_path / RUNS / "2/checkpoints/step-000000008.ckpt")
    assert resumed[METADATA_KEY]["validated_at"] == after


def _metrics(run: Path) -> dict[tuple[str, str], str]:
    """Values by step and name, but for the speed and those of an artifact."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if value and not name.startswith(("perf/", "artifact/")) and name not in ("step", "epoch")
    }


@pytest.mark.parametrize("limit", ["--trainer.max_steps=60", "--wallclock.seconds=0.001"])
def test_a_run_that_died_in_its_export_resumes_there(limit: str, whole: Path, tmp_path: Path, shard_folder: Path):
    """Nothing is left to train, by steps or by the clock."""
    shutil.copytree(whole.parent, tmp_path / RUNS / "1")
    expected = json.loads((tmp_path / RUNS / "1/summary.json").read_text())
    (tmp_path / RUNS / "1/summary.json").unlink()
    (tmp_path / RUNS / "1/artifact.zst").unlink()
    args = [*long(shard_folder), "--trainer.max_steps=100", limit, "--ckpt=last"]
    resumed = trainer(*args, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / RUNS / "2/summary.json").read_text())
    assert summary["steps"] == 60
    assert summary["stages"] == expected["stages"]
    assert (tmp_path / RUNS / "2/artifact.zst").is_file()


def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(whole: Path, tmp_path: Path, shard_folder: Path):
    result = run_faulty("interrupt_an_update", {"call": 40}, *long(shard_folder), cwd=tmp_path)
    assert result.returncode == 130
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 20
    resumed = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert digest(tmp_path / RUNS / "2/checkpoints/last.ckpt") == digest(whole / "last.ckpt")


@pytest.mark.parametrize("moment", ["checksum", "rename"])
def test_a_kill_during_a_save_leaves_the_one_before(moment: str, whole: Path, tmp_path: Path, shard_folder: Path):
    killed = run_faulty("kill_a_save", {"moment": moment}, *long(shard_folder), cwd=tmp_path)
    assert killed.returncode == -9
    resumed = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {RUNS}/1/checkpoints/last.ckpt" in resumed.stdout
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 14
    assert digest(tmp_path / RUNS / "2/checkpoints/last.ckpt") == digest(whole / "last.ckpt")


def test_every_damage_to_a_checkpoint_is_seen(whole: Path, tmp_path: Path):
    good = (whole / "last.ckpt").read_bytes()
    path = tmp_path / "a.ckpt"
    places = [*range(0, len(good), len(good) // 150), *range(len(good) - 100, len(good))]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(UserError, match=r"a\.ckpt: is damaged"):
            load_checkpoint(path)
    for content in (b"", good[:10], good[: len(good) // 2], good[:-1], good + b"\0"):
        path.write_bytes(content)
        assert verify_checksum(path)
    with pytest.raises(UserError, match="is a folder; give a file in it"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there is no such checkpoint"):
        load_checkpoint(tmp_path / "none")


def test_last_means_the_newest_whole_checkpoint(whole: Path, tmp_path: Path, shard_folder: Path):
    folder = tmp_path / RUNS / "1/checkpoints"
    folder.mkdir(parents=True)
    for name in ("step-000000060.ckpt", "step-000000056.ckpt"):
        content = bytearray((whole / name).read_bytes())
        content[len(content) // 2] ^= name.endswith("60.ckpt")
        (folder / name).write_bytes(content)
    os.link(folder / "step-000000060.ckpt", folder / "last.ckpt")
    result = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "last.ckpt: is damaged (its checksum does not match" in result.stdout
    assert f"resuming from {RUNS}/1/checkpoints/step-000000056.ckpt" in result.stdout
    assert digest(tmp_path / RUNS / "2/checkpoints/last.ckpt") == digest(whole / "last.ckpt")
    written = yaml.safe_load((tmp_path / RUNS / "2/config.yaml").read_text())  # repeats it
    assert written["ckpt"] == f"{RUNS}/1/checkpoints/step-000000056.ckpt"
    scored = trainer("validate", f"--ckpt={RUNS}/2/artifact.zst", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    (folder / "step-000000056.ckpt").unlink()
    os.rename(tmp_path / RUNS / "2", tmp_path / "elsewhere")
    result = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    assert result.returncode == 1
    assert "holds no whole checkpoint; start without --ckpt" in result.stderr


def test_a_full_disk_ends_the_run_in_one_line_and_the_checkpoint_before_stays(
    whole: Path, tmp_path: Path, shard_folder: Path
):
    """The third save meets the limit, as on a disk that others have filled meanwhile."""
    size = (whole / "last.ckpt").stat().st_size
    result = run_faulty("full_disk", {"size": size // 2}, *long(shard_folder), cwd=tmp_path)
    errors = result.stderr
    assert result.returncode == 1
    assert errors.strip().count("\n") == 0, errors
    assert "step-000000021.ckpt: " in errors
    assert "cannot be written" in errors
    folder = tmp_path / RUNS / "1/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-000000007.ckpt", "step-000000014.ckpt"]
    assert load_checkpoint(folder / "last.ckpt")["global_step"] == 14


def test_a_disk_that_is_full_in_the_export_says_where_the_training_is(tmp_path: Path, shard_folder: Path):
    result = run_faulty("full_disk_in_export", {"size": 20_000}, *long(shard_folder), cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "artifact.zst: cannot be written" in result.stderr
    assert f"kept in {RUNS}/1/checkpoints/last.ckpt: resume with --ckpt last" in result.stderr
    resumed = trainer(*long(shard_folder, "--ckpt=last", "--run_name=1"), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / RUNS / "1/artifact.zst").is_file()


def test_a_bad_gradient_stops_the_run_with_good_weights_saved(tmp_path: Path, shard_folder: Path):
    result = run_faulty("bad_gradient", {"steps": [5]}, *small(shard_folder), cwd=tmp_path)
    errors = result.stderr
    assert result.returncode == 1
    assert "step 5: the loss is " in errors
    assert "the gradient norm nan (bad gradient: blocks.2.mlp.down.weight); this update was not made" in errors
    assert "Traceback" not in errors
    saved = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert saved["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())


def test_bad_gradients_are_skipped_up_to_a_bound(tmp_path: Path, shard_folder: Path):
    args = small(shard_folder, "--stability.nonfinite=skip", "--stability.max_skipped=2")
    skipped = run_faulty("bad_gradient", {"steps": [3, 5]}, *args, cwd=tmp_path)
    assert skipped.returncode == 0, skipped.stderr
    assert "skipped (2 of at most 2)" in skipped.stdout
    stopped = run_faulty("bad_gradient", {"steps": [3, 5, 6]}, *args, cwd=tmp_path)
    assert stopped.returncode == 1
    assert "this update after 2 skipped ones was not made" in stopped.stderr


FAULTS = {  # of tests.faults: the message, and whether the steps before are saved
    "cut_shard": ("train_000000.bin: had", True),
    "remove_shard": ("train_000000.bin: existed when the run began", True),
    "break_reader": ("/nowhere/shard: No such file or directory", True),
    "block_checkpoints": ("cannot be written", False),
    "fail_device": ("the device failed at about step 10: CUDA error: it fell. Checkpoints are kept", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_external_fault_ends_the_run_in_one_line(fault: str, tmp_path: Path, shard_folder: Path):
    message, is_saved = FAULTS[fault]
    shutil.copytree(shard_folder, tmp_path / "data")
    result = run_faulty("at_step", {"step": 9, "fault": fault}, *long(tmp_path / "data"), cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert result.stderr.strip().count("\n") == 0, result.stderr
    assert message in result.stderr
    if fault == "fail_device":
        assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 7
    if is_saved:  # up to the fault; batches that were read ahead may still be trained on
        assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] >= 9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--data.batch_tokens=512"],
            "had data.batch_tokens 256, this one has 512, and would resume at another position",
        ),
        (["--data.order=shuffled"], "had data.order sequential"),
        (["--model.num_layers=5"], "the checkpoint holds another model (num_layers: 4 in the checkpoint, 5 here"),
    ],
)
def test_resuming_with_another_text_or_model_is_refused(
    args: list[str], message: str, whole: Path, tmp_path: Path, shard_folder: Path
):
    shards = tmp_path / "not made yet"  # refused before any data is prepared
    result = trainer_here(*long(shards, *args), f"--ckpt={whole / 'last.ckpt'}", cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr


def test_resuming_with_another_tokenizer_is_refused(whole: Path, tmp_path: Path, shard_folder: Path):
    shutil.copytree(shard_folder, tmp_path / "shards")
    train_tokenizer(iter(make_documents(300, 7)), 300, tmp_path / "shards/tokenizer.model", 1)
    result = trainer_here(*long(tmp_path / "shards"), f"--ckpt={whole / 'last.ckpt'}", cwd=tmp_path)
    assert result.returncode == 1
    assert "trained with another tokenizer" in result.stderr


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, shard_folder: Path):
    """Finite gradients and an update that is not."""
    result = run_faulty("at_step", {"step": 9, "fault": "spoil_weights"}, *long(shard_folder), cwd=tmp_path)
    assert result.returncode == 1
    assert "step 14: the weights are not finite; the last saved step is 7" in result.stderr
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 7


def test_sigterm_ends_an_export(tmp_path: Path, shard_folder: Path):
    result = run_faulty("sigterm_in_the_export", {}, *small(shard_folder), cwd=tmp_path)
    assert result.returncode == 143, result.stderr
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 8


def test_the_budget_is_kept_to_one_step_and_validation_is_not_counted(tmp_path: Path, shard_folder: Path):
    args = small(shard_folder, "--trainer.max_steps=1000", "--wallclock.seconds=3")
    result = run_faulty("slow", {"step": 0.3, "validation": 3}, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / RUNS / "1/summary.json").read_text())
    assert 3 <= summary["train_seconds"] < 4
    assert 5 <= summary["steps"] <= 10  # validation after step 4 would have used up the budget


def test_a_clock_that_jumps_moves_no_training_time(monkeypatch: pytest.MonkeyPatch):
    clock = TrainingClock(10.0)
    clock.start()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the system's clock is set back by decades
    clock.pause()
    assert 0 <= clock.elapsed < 5


def test_a_bad_batch_on_one_process_stops_all_with_good_weights(tmp_path: Path, shard_folder: Path):
    args = small(shard_folder, "--trainer.accelerator=cpu", "--trainer.devices=2")
    result = run_faulty("bad_loss", {"step": 4, "rank": 1}, *args, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("trainer: step 5: the loss is ") == 2, result.stderr
    assert "this update was not made" in result.stderr
    saved = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert saved["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resumed_run_is_bit_identical_on_a_gpu_with_deterministic_kernels(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = small(shard_folder, "--trainer.deterministic=true", "--model.attention.backend=math", "--precision=32-true")
    whole = trainer(*args, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    broken = run_faulty("at_step", {"step": 5, "fault": "raise_error"}, *args, cwd=tmp_path)
    assert "planted" in broken.stderr
    resumed = trainer(*args, f"--ckpt={RUNS}/2/checkpoints/last.ckpt", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    ends = [digest(tmp_path / RUNS / f"{run}/checkpoints/last.ckpt") for run in (1, 3)]
    assert load_checkpoint(tmp_path / RUNS / "2/checkpoints/last.ckpt")["global_step"] == 5
    assert ends[0] == ends[1]


def test_a_second_interruption_prints_nothing_more():
    """At its exit Python calls what is registered, such as by torch; an interruption there is a traceback."""
    program = (
        "import atexit, os, signal, sys\n"
        "import trainer.__main__ as program\n"
        "interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "program._run = interrupt\n"
        "atexit.register(interrupt)\n"
        "sys.argv = ['trainer', 'runs']\n"
        "sys.exit(program.program())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert result.stderr == "trainer: interrupted\n"
    assert result.returncode == -signal.SIGINT


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused_before_the_training(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("trainer.callbacks.checkpoint.shutil.disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"has 0\.1 MB free, but a checkpoint takes more than .* MB; free some space"):
        train.run("fit", small(shard_folder)[1:])
