"""A run that is named can be interrupted and continued in its own folder; nodes may have folders of their own."""

import csv
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import RUNS, digest, environment, run_faulty, small, start_faulty, trainer, trainer_here
from trainer.callbacks.metrics_file import MetricsFile
from trainer.checkpoint import read_progress

NAMED = ["--run_name=night", "--ckpt=last", "--checkpoints.every=2"]
LAST = Path("checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    result = trainer(*small(shard_folder), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / RUNS / "1"


@pytest.mark.parametrize(("how", "code"), [("SIGTERM", 143), ("SIGKILL", -9)])
def test_the_same_command_continues_an_interrupted_run(
    how: str, code: int, undisturbed: Path, tmp_path: Path, shard_folder: Path
):
    run = tmp_path / RUNS / "night"
    stopped = run_faulty("end_a_process", {"how": how, "step": 4}, *small(shard_folder, *NAMED), cwd=tmp_path)
    assert stopped.returncode == code, stopped.stderr
    assert "the run night has no checkpoint yet, and starts" in stopped.stdout
    assert read_progress(run / LAST).step == 4
    resumed = trainer(*small(shard_folder, *NAMED), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {RUNS / 'night' / LAST}" in resumed.stdout
    assert [path.name for path in (tmp_path / RUNS).iterdir()] == ["night"]
    assert digest(run / LAST) == digest(undisturbed / LAST)
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    with (run / "metrics.csv").open() as file, (undisturbed / "metrics.csv").open() as whole:
        losses, expected = (
            [(row["step"], row["train/loss"]) for row in csv.DictReader(each) if row["train/loss"]]
            for each in (file, whole)
        )
    assert losses == expected
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt"] is None  # the file starts a run of its own
    assert "resuming from" in (run / "train.log").read_text()


def test_last_of_a_name_never_takes_another_run(undisturbed: Path, tmp_path: Path, shard_folder: Path):
    shutil.copytree(undisturbed, tmp_path / RUNS / "other")
    started = trainer(*small(shard_folder, *NAMED, "--trainer.max_steps=2", "--export.enabled=false"), cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    assert "the run night has no checkpoint yet, and starts" in started.stdout
    assert read_progress(tmp_path / RUNS / "night" / LAST).step == 2


def test_a_name_without_last_is_refused_where_a_run_has_it(undisturbed: Path, shard_folder: Path):
    before = sorted(undisturbed.rglob("*"))
    refused = trainer_here(*small(shard_folder, "--run_name=1"), cwd=undisturbed.parents[2])
    assert refused.returncode == 1
    assert (
        "this run exists already; choose another --run_name, or let fit continue it with --ckpt last" in refused.stderr
    )
    assert sorted(undisturbed.rglob("*")) == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    undisturbed: Path, tmp_path: Path, shard_folder: Path
):
    run = tmp_path / RUNS / "night"
    shutil.copytree(undisturbed, run)
    for checkpoint in run.glob("checkpoints/*.ckpt"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    refused = trainer_here(*small(shard_folder, *NAMED), cwd=tmp_path)
    assert refused.returncode == 1
    assert "holds no whole checkpoint" in refused.stderr
    assert (run / "summary.json").is_file()


def test_two_processes_cannot_train_one_run(tmp_path: Path, shard_folder: Path):
    first = start_faulty("slow", {"step": 3}, *small(shard_folder, *NAMED), cwd=tmp_path)
    try:
        lock = tmp_path / RUNS / "night/.training"
        while not lock.is_dir():
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
        refused = trainer(*small(shard_folder, *NAMED), cwd=tmp_path)
        assert refused.returncode == 1
        assert "another process does that now" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_metrics_before_the_resumed_step_stay(tmp_path: Path):
    folder = tmp_path / "recipe/night"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,loss\n0,3.0\n1,2.5\n2,2.0\n3,1.")  # the last row is cut
    metrics = MetricsFile(str(tmp_path), "recipe", "night")
    metrics.resumed_step = 2
    metrics.log_metrics({"loss": 2.25, "rate": 0.5}, 2)
    metrics.finalize("success")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["rate"]) for row in rows] == [
        ("0", "3.0", ""), ("1", "2.5", ""), ("2", "2.25", "0.5"),
    ]  # fmt: skip


# --- Two nodes that share no folder


def on_two_nodes(folders: list[Path], *args: str) -> list[subprocess.CompletedProcess[str]]:
    """Run one training on two nodes, each with a working directory of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank, folder in enumerate(folders):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        command += [f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}", "-m", "trainer"]
        command += [*args, "--trainer.num_nodes=2", "--trainer.accelerator=cpu"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen(command, cwd=folder, env=environment(), **pipes))
    outputs = [node.communicate(timeout=200) for node in nodes]
    return [
        subprocess.CompletedProcess(node.args, node.returncode, *output)
        for node, output in zip(nodes, outputs, strict=True)
    ]


@pytest.fixture
def nodes(tmp_path: Path, shard_folder: Path) -> list[Path]:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        shutil.copytree(shard_folder, folder / "shards")
    return folders


def test_nodes_without_a_shared_folder_train_and_score_one_run(nodes: list[Path]):
    args = small(Path("shards"), "--trainer.max_steps=2", "--run_name=night", "--ckpt=last")
    first, second = on_two_nodes(nodes, *args)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert "val_bpb=" in first.stdout
    assert (nodes[0] / RUNS / "night/artifact.zst").is_file()
    assert not list(nodes[1].rglob("*.zst"))
    # Only the first node has the checkpoint to resume from.
    for node in on_two_nodes(nodes, *args, "--trainer.max_steps=4"):
        assert node.returncode != 0
    assert read_progress(nodes[0] / RUNS / "night" / LAST).step == 2


def test_a_node_with_other_shards_is_refused_before_the_first_step(nodes: list[Path]):
    (nodes[1] / "shards/words_train_000001.bin").unlink()
    first, second = on_two_nodes(nodes, *small(Path("shards")))
    assert first.returncode != 0
    assert second.returncode != 0
    assert "is not the text of process 0" in second.stderr
    assert "share the folder between the nodes, or copy it to all of them" in second.stderr
    assert "step" not in first.stdout
