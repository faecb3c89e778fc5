"""Runs that die, files that rot: what was saved is whole, and what goes on from it ends with the same weights."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, make_documents
from tests.test_end_to_end import RUN, digest, small, trainer, trainer_here
from trainer.checkpoint import verify_checksum, load_checkpoint
from trainer.clock import TrainingClock
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import UserError

KILLS = int(os.environ.get("GOLF_KILLS", "3"))  # more of them take 4 seconds each
RUNS = Path(RUN)
# `trainer` with something planted into it, by way of sitecustomize.
PLANTED = "import sys\n{}\nfrom trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"


def planted(code: str, *words: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the trainer after some code that changes it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", PLANTED.format(code), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


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
    slow = (
        "import time\n"
        "from trainer.step import StepFence\n"
        "old = StepFence.record\n"
        "StepFence.record = lambda *words: (time.sleep(0.03), old(*words))[1]"
    )
    kills = 0
    while kills < KILLS:
        ckpt = ["--ckpt=last"] if list((tmp_path / RUNS).glob("*/checkpoints/*.ckpt")) else []
        with planted(slow, *long(shard_folder), *ckpt, cwd=tmp_path) as process:
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


@pytest.mark.parametrize("limit", ["--trainer.max_steps=60", "--wallclock.seconds=0.001"])
def test_a_run_that_died_in_its_export_is_gone_on_with_there(
    limit: str, whole: Path, tmp_path: Path, shard_folder: Path
):
    """Nothing is left to train, by steps or by the clock."""
    shutil.copytree(whole.parent, tmp_path / RUNS / "1")
    expected = json.loads((tmp_path / RUNS / "1/summary.json").read_text())
    (tmp_path / RUNS / "1/summary.json").unlink()
    (tmp_path / RUNS / "1/artifact.zst").unlink()
    words = [*long(shard_folder), "--trainer.max_steps=100", limit, "--ckpt=last"]
    resumed = trainer(*words, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    found = json.loads((tmp_path / RUNS / "2/summary.json").read_text())
    assert found["steps"] == 60
    assert found["stages"] == expected["stages"]
    assert (tmp_path / RUNS / "2/artifact.zst").is_file()


def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(whole: Path, tmp_path: Path, shard_folder: Path):
    interrupt = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from trainer.optim.muon_adamw import MuonAdamW\n"
        "old, seen = MuonAdamW._adamw, []\n"
        "def between(self, *words):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 40: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return old(self, *words)\n"
        "MuonAdamW._adamw = between"
    )
    with planted(interrupt, *long(shard_folder), cwd=tmp_path) as process:
        process.communicate()
    assert process.returncode == 130
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 20
    resumed = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert digest(tmp_path / RUNS / "2/checkpoints/last.ckpt") == digest(whole / "last.ckpt")


@pytest.mark.parametrize("moment", ["seal", "replace"])
def test_a_kill_during_a_save_leaves_the_one_before(moment: str, whole: Path, tmp_path: Path, shard_folder: Path):
    die = {
        "seal": "import trainer.callbacks.checkpoint as io\nold = io.seal\nname = 'seal'",
        "replace": "import os as io\nold = io.replace\nname = 'replace'",
    }[moment]
    die += (
        "\nimport os\nseen = []\n"
        "def kill(*words):\n"
        "    if name == 'seal' or 'step-' in str(words[-1]): seen.append(1)\n"
        "    if len(seen) == 3: os.kill(os.getpid(), 9)\n"
        "    return old(*words)\n"
        "setattr(io, name, kill)"
    )
    with planted(die, *long(shard_folder), cwd=tmp_path) as process:
        process.communicate()
        assert process.returncode == -9
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
    with pytest.raises(UserError, match="there is no such checkpoint"):
        load_checkpoint(tmp_path)


def test_last_means_the_newest_whole_checkpoint(whole: Path, tmp_path: Path, shard_folder: Path):
    folder = tmp_path / RUNS / "1/checkpoints"
    folder.mkdir(parents=True)
    for age, name in enumerate(("step-000000060.ckpt", "step-000000056.ckpt")):
        content = (whole / name).read_bytes()
        (folder / name).write_bytes(content if age else content[:-5000])
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    os.link(folder / "step-000000060.ckpt", folder / "last.ckpt")
    result = trainer(*long(shard_folder), "--ckpt=last", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "last.ckpt: is damaged (no checksum at its end" in result.stdout
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
    full = (
        "import resource, trainer.callbacks.checkpoint as io\nold = io.atomic_write\nseen = []\n"
        "def write(path):\n"
        "    seen.append(path)\n"
        f"    if len(seen) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        "    return old(path)\n"
        "io.atomic_write = write"
    )
    with planted(full, *long(shard_folder), cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.strip().count("\n") == 0, errors
    assert "step-000000021.ckpt: " in errors
    assert "cannot be written" in errors
    folder = tmp_path / RUNS / "1/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-000000007.ckpt", "step-000000014.ckpt"]
    assert load_checkpoint(folder / "last.ckpt")["global_step"] == 14


def bad_gradient(*steps: int) -> str:
    """One gradient becomes nan at some steps (counted from 1), as a bad batch would make it."""
    return (
        "from trainer.lightning_module import LanguageModel as M\n"
        "old = M.on_before_optimizer_step\n"
        "def poison(self, optimizer):\n"
        f"    if self.steps_done + 1 in {steps}: self.model.blocks[2].mlp.down.weight.grad[0, 0] = float('nan')\n"
        "    old(self, optimizer)\n"
        "M.on_before_optimizer_step = poison"
    )


def test_a_bad_gradient_stops_the_run_with_good_weights_saved(tmp_path: Path, shard_folder: Path):
    with planted(bad_gradient(5), *small(shard_folder), cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "step 5: the loss is " in errors
    assert "the gradient norm nan (bad gradient: blocks.2.mlp.down.weight); this update was not made" in errors
    assert "Traceback" not in errors
    saved = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert saved["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())


def test_bad_gradients_are_skipped_up_to_a_bound(tmp_path: Path, shard_folder: Path):
    words = small(shard_folder, "--stability.nonfinite=skip", "--stability.max_skipped=2")
    with planted(bad_gradient(3, 5), *words, cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "skipped (2 of at most 2)" in errors
    with planted(bad_gradient(3, 5, 6), *words, cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "this update after 2 skipped ones was not made" in errors


def at_step(step: int, code: str) -> str:
    """Something that happens after so many steps of training."""
    return (
        "from pathlib import Path\nimport os, shutil\n"
        "from trainer.callbacks.stability import StabilityMonitor as W\n"
        "old = W.on_train_batch_start\n"
        "def happen(self, trainer, module, *rest):\n"
        "    old(self, trainer, module, *rest)\n"
        f"    if trainer.global_step == {step}: {code}\n"
        "W.on_train_batch_start = happen"
    )


SHARD = "Path(trainer.datamodule.text.train[0])"
FAULTS = {
    "a shard is cut": (f"os.truncate({SHARD}, 4000)", "train_000000.bin: had", True),
    "a shard is removed": (f"os.unlink({SHARD})", "train_000000.bin: was there when the run began", True),
    "the reading thread dies": (
        "trainer.train_dataloader.dataset.files.read = lambda *_: os.stat('/nowhere/shard')",
        "/nowhere/shard: No such file or directory",
        True,
    ),
    "the run folder cannot be written": (
        "shutil.rmtree(Path(trainer.log_dir) / 'checkpoints'); (Path(trainer.log_dir) / 'checkpoints').touch()",
        "cannot be written",
        False,
    ),
    "the device fails": (
        "import torch; module.model.state_dict = None; raise torch.AcceleratorError('CUDA error: it fell\\nmore')",
        "the device failed, seen at step 10: CUDA error: it fell. What was saved stays",
        False,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_others_ends_the_run_in_one_line(fault: str, tmp_path: Path, shard_folder: Path):
    code, said, is_saved = FAULTS[fault]
    shutil.copytree(shard_folder, tmp_path / "data")
    with planted(at_step(9, code), *long(tmp_path / "data"), cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert errors.strip().count("\n") == 0, errors
    assert said in errors
    if fault == "the device fails":
        assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 7
    if is_saved:  # what was trained until the fault; batches that were read ahead may still be learned
        assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] >= 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.batch_tokens=512"], "had data.batch_tokens 256, this one 512, and would go on at another place"),
        (["--data.order=shuffled"], "had data.order sequential"),
        (["--model.num_layers=5"], "the checkpoint holds another model (num_layers: 4 there, 5 here"),
    ],
)
def test_going_on_with_another_text_or_model_is_refused(
    words: list[str], message: str, whole: Path, tmp_path: Path, shard_folder: Path
):
    result = trainer_here(*long(shard_folder, *words), f"--ckpt={whole / 'last.ckpt'}", cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr


def test_going_on_with_text_in_other_pieces_is_refused(whole: Path, tmp_path: Path, shard_folder: Path):
    shutil.copytree(shard_folder, tmp_path / "shards")
    train_tokenizer(iter(make_documents(300, 7)), 300, tmp_path / "shards/tokenizer.model", 1)
    result = trainer_here(*long(tmp_path / "shards"), f"--ckpt={whole / 'last.ckpt'}", cwd=tmp_path)
    assert result.returncode == 1
    assert "another tokenizer's pieces" in result.stderr


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, shard_folder: Path):
    """Finite gradients and an update that is not."""
    spoil = at_step(9, "module.model.blocks[1].mlp.up.weight.data[0, 0] = float('inf')")
    spoil += "\nfrom trainer.callbacks.stability import StabilityMonitor\nWatch._look = lambda *words, **more: None"
    with planted(spoil, *long(shard_folder), cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "step 14: the weights are not finite; step 7 is the last one that is saved" in errors
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 7


def test_sigterm_ends_an_export(tmp_path: Path, shard_folder: Path):
    kill = (
        "import os, signal\nfrom trainer.callbacks import export as e\n"
        "e.export = lambda *words: os.kill(os.getpid(), signal.SIGTERM)"
    )
    with planted(kill, *small(shard_folder), cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")["global_step"] == 8


def test_the_budget_is_kept_to_one_step_and_validation_is_not_counted(tmp_path: Path, shard_folder: Path):
    slow = (
        "import time\n"
        "from trainer.step import StepFence\n"
        "from trainer.lightning_module import LanguageModel as M\n"
        "step, score = StepFence.record, M.on_validation_epoch_start\n"
        "StepFence.record = lambda *words: (time.sleep(0.1), step(*words))[1]\n"
        "M.on_validation_epoch_start = lambda self: (time.sleep(0.5), score(self))[1]"
    )
    words = small(shard_folder, "--trainer.max_steps=1000", "--wallclock.seconds=1")
    with planted(slow, *words, cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    summary = json.loads((tmp_path / RUNS / "1/summary.json").read_text())
    assert 1 <= summary["train_seconds"] < 1.45
    assert 5 <= summary["steps"] <= 10


def test_a_clock_that_jumps_moves_no_training_time(monkeypatch: pytest.MonkeyPatch):
    clock = TrainingClock(10.0)
    clock.start()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the system's clock is set back by decades
    clock.pause()
    assert 0 <= clock.elapsed < 5


def test_a_bad_batch_on_one_rank_stops_all_with_good_weights(tmp_path: Path, shard_folder: Path):
    (tmp_path / "poisoned.py").write_text(
        "import os, sys\n"
        "from trainer.lightning_module import LanguageModel as M\n"
        "from trainer.__main__ import main\n"
        "old = M.training_step\n"
        "def step(self, batch, index):\n"
        "    nll = self.nll\n"
        "    if self.steps_done == 4 and self.trainer.global_rank == 1:\n"
        "        self.nll = lambda *words: nll(*words) * float('nan')\n"
        "    old(self, batch, index)\n"
        "    self.nll = nll\n"
        "M.training_step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = small(shard_folder, "--trainer.accelerator=cpu", "--trainer.devices=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "poisoned.py", *words]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.count("trainer: step 5: the loss is ") == 2, found.stderr
    assert "this update was not made" in found.stderr
    saved = load_checkpoint(tmp_path / RUNS / "1/checkpoints/last.ckpt")
    assert saved["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resumed_run_is_bit_identical_on_a_gpu_with_deterministic_kernels(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    words = small(shard_folder, "--trainer.deterministic=true", "--model.attention.backend=math", "--precision=32-true")
    whole = trainer(*words, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    with planted(at_step(5, "raise OSError('planted')"), *words, cwd=tmp_path) as process:
        _, errors = process.communicate()
    assert "planted" in errors
    resumed = trainer(*words, f"--ckpt={RUNS}/2/checkpoints/last.ckpt", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    ends = [digest(tmp_path / RUNS / f"{run}/checkpoints/last.ckpt") for run in (1, 3)]
    assert load_checkpoint(tmp_path / RUNS / "2/checkpoints/last.ckpt")["global_step"] == 5
    assert ends[0] == ends[1]
