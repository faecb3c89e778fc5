"""A process of several that dies takes the run down soon, and what was saved goes on with another number of them."""

import time
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.test_end_to_end import RUN, score_of, small, trainer
from trainer.checkpoint import load_checkpoint

# One rank comes to its end between two steps, while the other one goes on and waits for it.
SCRIPT = """
import os, signal, sys
from trainer.__main__ import main
from trainer.lightning_module import LanguageModel
rank = int(os.environ.get("LOCAL_RANK", 0))
old = LanguageModel.training_step
def hook(self, *words):
    if rank == {rank} and self.trainer.global_step == 5:
        {end}
    return old(self, *words)
LanguageModel.training_step = hook
raise SystemExit(main(sys.argv[1:]))
"""
KILL, RAISE = "os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('planted')"
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--checkpoints.every=2", "--precision=64-true"]


@pytest.mark.parametrize(("rank", "end", "saved"), [(1, KILL, 4), (0, RAISE, 5), (1, RAISE, 4)])
def test_a_rank_that_ends_takes_the_run_down_and_leaves_a_checkpoint(
    rank: int, end: str, saved: int, tmp_path: Path, shard_folder: Path
):
    (tmp_path / "script.py").write_text(SCRIPT.format(rank=rank, end=end))
    started = time.monotonic()
    result = run_python("script.py", *small(shard_folder, *TWO), cwd=tmp_path, timeout=120)
    assert result.returncode != 0
    assert time.monotonic() - started < 60
    if end == RAISE:
        assert "planted" in result.stderr
    else:
        assert "rank" in result.stderr.lower()
    checkpoint = load_checkpoint(tmp_path / RUN / "1/checkpoints/last.ckpt")
    assert checkpoint["global_step"] >= saved
    if end == RAISE:
        return
    alone = trainer(*small(shard_folder, "--precision=64-true"), "--ckpt=last", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    whole = trainer(*small(shard_folder, "--precision=64-true"), cwd=tmp_path)
    assert score_of(alone.stdout)["val_bpb"] == pytest.approx(score_of(whole.stdout)["val_bpb"], abs=1e-7)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    rank: int, name: str, code: int, tmp_path: Path, shard_folder: Path
):
    end = f"os.kill(os.getpid(), signal.{name})"
    (tmp_path / "script.py").write_text(SCRIPT.format(rank=rank, end=end))
    result = run_python("script.py", *small(shard_folder, *TWO), cwd=tmp_path, timeout=120)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    checkpoint = load_checkpoint(tmp_path / RUN / "1/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 6  # the step that the signal came in


@pytest.mark.parametrize("where", ["validation_step", "nll_of"])  # the second: where the export scores
def test_a_signal_to_all_outside_of_steps_ends_them_at_once(where: str, tmp_path: Path, shard_folder: Path):
    script = SCRIPT.replace("training_step", where).replace(
        "rank == {rank} and self.trainer.global_step == 5", "{when}"
    )
    when = "self.trainer.global_step == " + ("4" if where == "validation_step" else "8")
    (tmp_path / "script.py").write_text(script.format(when=when, end="os.kill(os.getpid(), signal.SIGTERM)"))
    started = time.monotonic()
    result = run_python("script.py", *small(shard_folder, *TWO), cwd=tmp_path, timeout=120)
    assert result.returncode == 143, result.stderr
    assert time.monotonic() - started < 60
    folder = tmp_path / RUN / "1"
    assert load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == int(when[-1])
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_those_that_are_left_say_so_in_one_line(rank: int, tmp_path: Path, shard_folder: Path):
    (tmp_path / "script.py").write_text(SCRIPT.format(rank=rank, end=KILL))
    started = time.monotonic()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    result = run_python(*torchrun, *small(shard_folder, *TWO), cwd=tmp_path, timeout=120)
    assert result.returncode != 0
    assert time.monotonic() - started < 60
    assert "another process of this run has ended" in result.stderr
    assert load_checkpoint(tmp_path / RUN / "1/checkpoints/last.ckpt")["global_step"] >= 4


def test_a_model_over_the_cap_ends_all_ranks(tmp_path: Path, shard_folder: Path):
    result = trainer(*small(shard_folder, *TWO, "--export.cap=1000"), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("over the cap of 1,000") == 1
