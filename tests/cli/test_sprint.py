"""A sprint trains its seeds, one job a GPU, and compares them with an earlier one."""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.conftest import TINY_OPTIONS
from tests.helpers import environment, trainer_here
from trainer.cli import sprint as module
from trainer.data.manifest import Manifest, ShardRecord
from trainer.files import sha256_of
from trainer.run_folder import RunFolder


@pytest.fixture
def data(tmp_path: Path, shard_folder: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(shard_folder, folder)
    shards = [
        ShardRecord(path.name, "val" if "val" in path.name else "train", 1, 1, 1, 7, path.name)
        for path in sorted(folder.glob("*.bin"))
    ]
    Manifest({}, sha256_of(folder / "tokenizer.model"), shards, {"train": "1", "val": "2"}, 0, {}).write(folder)
    return folder


def test_a_sprint_runs_its_seeds_and_is_compared_with_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    options = ["--export.enabled=false", *TINY_OPTIONS]
    settings = [each for option in options for each in ("--set", option.removeprefix("--"))]
    args = ["sprint", "--config=int5mlp_10l", f"--data={data}", "--seeds=2", "--steps=4", *settings]
    first = trainer_here(*args, "--name=base", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    more = ["--name=slow", "--against=base", "--set=model.optimizer.matrix_lr=0.001"]
    second = trainer_here(*args, *more, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    runs = tmp_path / "runs/int5mlp_10l"
    assert sorted(path.name for path in runs.iterdir()) == ["base-seed1", "base-seed2", "slow-seed1", "slow-seed2"]
    read = {path.name: RunFolder(path).read() for path in runs.iterdir()}
    assert [read[f"slow-seed{seed}"].config["seed_everything"] for seed in (1, 2)] == [1, 2]
    assert "\nseed 2 of 2: slow-seed2 starts\n" in second.stdout
    base, row = second.stdout.splitlines()[-2:]
    assert base.startswith("| base: int5mlp_10l | 2 | 4 |")
    assert row.startswith("| slow: model.optimizer.matrix_lr=0.001 | 2 | 4 |")
    differences = [
        read[f"slow-seed{seed}"].summary["val_bpb"] - read[f"base-seed{seed}"].summary["val_bpb"] for seed in (1, 2)
    ]
    assert f"| {sum(differences) / 2:+.4f} ± " in row
    refused = trainer_here(*args, "--name=again", "--against=base", cwd=tmp_path)  # before anything is trained
    assert "--against base: has these settings already, and this code" in refused.stderr
    assert not (runs / "again-seed1").exists()
    assert trainer_here(*args, "--name=base", cwd=tmp_path).stderr.endswith(
        "base-seed1: this run exists already; choose another --name\n"
    )


def test_jobs_are_spread_over_the_gpus_and_failures_counted(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
):
    used: list[tuple[str, str]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        used.append((command[-2].partition("=")[2], env["CUDA_VISIBLE_DEVICES"]))
        return subprocess.CompletedProcess(command, int(command[-2].endswith("seed3")))

    monkeypatch.setattr(module, "_settings", lambda job: {})
    monkeypatch.setattr(module, "gpu_count", lambda: 2)
    monkeypatch.setattr(module.subprocess, "run", run)
    result = trainer_here("sprint", "--config=frontier", f"--data={data}", "--seeds=6", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "trainer: 1 of 6 runs failed; trainer compare shows the others\n"
    assert sorted(name for name, _ in used) == [f"sprint-seed{seed}" for seed in range(1, 7)]
    assert {device for _, device in used} == {"0", "1"}


def test_only_a_script_that_was_asked_for_the_sprint_runs_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another one would start a sprint in each run of the sprint, and so on."""
    script = types.ModuleType("__main__")
    script.__file__ = str(tmp_path / "mine.py")
    ours = [sys.executable, "-m", "trainer"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", script)
        (tmp_path / "mine.py").touch()
        for argv, expected in ((["mine.py", "sprint"], [sys.executable, script.__file__]), (["mine.py"], ours)):
            patch.setattr(sys, "argv", argv)
            assert module.program() == expected
    monkeypatch.setenv(module.INSIDE, "1")
    refused = trainer_here("sprint", "--config=quickstart", f"--data={data}", cwd=tmp_path)
    assert "must not start a sprint itself" in refused.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data=nowhere"], "--data nowhere: holds no manifest.json"),
        (["--seeds=0"], "--seeds must be at least 1, not 0"),
        (["--steps=0"], "--steps must be at least 1, not 0"),
        (["--set=seed_everything=7"], "--set seed_everything: a sprint decides that itself"),
        (["--set=data.seed=7"], "--set data.seed: a sprint decides that itself"),
        (["--set=trainer.max_steps=9"], "--set trainer.max_steps: a sprint decides that itself"),
        (["--set=data.source.folder=x"], "--set data.source.folder: a sprint decides that itself"),
        (["--set=trainer={max_steps: 3}"], "--set trainer: a sprint decides that itself"),
        (["--against=other"], "--against other: there is no finished run"),
        (["--set=model.num_layer=9"], "did you mean --model.num_layers?"),
    ],
)
def test_a_sprint_that_cannot_be_made_is_refused_at_once(args: list[str], message: str, data: Path, tmp_path: Path):
    result = trainer_here("sprint", "--config=quickstart", f"--data={data}", *args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr


def test_the_users_own_script_runs_again_for_each_seed(data: Path, tmp_path: Path):
    """It may change what no option can, as in docs/extending.md."""
    (tmp_path / "mine.py").write_text(
        "from trainer.__main__ import main\n"
        "from trainer.optim import newton_schulz\n"
        "newton_schulz.newton_schulz = lambda batch, steps: batch\n"
        "if __name__ == '__main__':\n"
        "    raise SystemExit(main())\n"
    )
    options = ["--export.enabled=false", *TINY_OPTIONS]
    settings = [each for option in options for each in ("--set", option.removeprefix("--"))]
    args = ["sprint", "--config=int5mlp_10l", f"--data={data}", "--seeds=1", "--steps=3", *settings]
    for name, program, more in (("plain", ["-m", "trainer"], []), ("mine", ["mine.py"], ["--against=plain"])):
        command = [sys.executable, *program, *args, f"--name={name}", *more]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, result.stderr
    mine, plain = (RunFolder(tmp_path / f"runs/int5mlp_10l/{name}-seed1").read() for name in ("mine", "plain"))
    assert mine.summary["val_bpb"] != plain.summary["val_bpb"]
    script = {"name": "mine.py", "sha256": sha256_of(tmp_path / "mine.py")}
    assert (mine.summary["script"], "script" in plain.summary) == (script, False)
    base, row = result.stdout.splitlines()[-2:]
    assert (base.split(" | ")[0], row.split(" | ")[0]) == (
        "| plain: int5mlp_10l",
        f"| mine: script=mine.py@{script['sha256'][:8]}",
    )
    assert f"{mine.summary['val_bpb'] - plain.summary['val_bpb']:+.4f}" in row
    again = trainer_here("rerun", str(mine.folder), cwd=tmp_path)
    assert "warning: mine-seed1 ran with mine.py (" in again.stdout.replace("int5mlp_10l/", "")
