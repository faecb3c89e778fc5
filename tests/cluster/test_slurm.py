"""The job script of docs/multi-gpu.md on a real SLURM: two nodes, requeue, signals, cancellation, a dead node."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, wait_for
from tests.conftest import ROOT
from tests.helpers import digest, environment, small
from trainer.checkpoint import read_progress, verify_checksum

RUNS = Path("runs/int5mlp_10l_8gpu")
LAST = Path("checkpoints/last.ckpt")
STEPS = 400
(SCRIPT,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", (ROOT / "docs/multi-gpu.md").read_text(), re.DOTALL)
ONE_TASK = ["--ntasks-per-node=1", "--gpus-per-node=1"]
RESUMED = "resuming from"

pytestmark = pytest.mark.skipif("GOLF_CLUSTER" not in os.environ, reason="run by .ci/cluster")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Job:
    """The documented script as a job on two nodes with one CPU process each."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path, *more: str, nodes: int = 2) -> None:
        script = folder / "job.sh"
        script.write_text(SCRIPT)
        options = [word for word in small(shards) if not word.startswith(("fit", "--config"))]
        options += [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=200", "--checkpoints.every=40"]
        options += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--precision=64-true", "--report.enabled=false"]
        options += ["--wallclock.seconds=null", "--model.schedule.warmdown_steps=100"]  # a budget depends on the speed
        variables = environment(MASTER_ADDR="127.0.0.1")  # the nodes' names stand in no DNS
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        self.cluster, self.folder = cluster, folder
        self.id = cluster.submit(script, folder, [f"--nodes={nodes}", *ONE_TASK], [*options, *more], **variables)
        self.run = folder / RUNS / self.id
        self.output = folder / "job.out"

    def wait_for_checkpoint(self, step: int = 40) -> None:
        wait_for(lambda: read_progress(self.run / LAST).step >= step, 90, f"step {step}: {self.text()}")

    def wait_for_end(self, seconds: float = 120) -> str:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        wait_for(lambda: self.cluster.state(self.id) in ends, seconds, f"the end of the job: {self.text()}")
        return self.cluster.state(self.id)

    def text(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Job:
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed"), shard_folder)
    assert job.wait_for_end() == "COMPLETED", job.text()
    return job


def test_two_nodes_make_one_run(undisturbed: Job):
    assert [path.name for path in (undisturbed.folder / RUNS).iterdir()] == [undisturbed.id]
    assert json.loads((undisturbed.run / "summary.json").read_text())["steps"] == STEPS
    assert (undisturbed.run / "artifact.zst").is_file()
    assert undisturbed.text().count("Run finished") == 1
    assert "recommended" not in undisturbed.text()  # no hint of a library


def test_a_job_that_is_interrupted_twice_ends_with_the_same_weights(
    cluster: Cluster, undisturbed: Job, tmp_path: Path, shard_folder: Path
):
    job = Job(cluster, tmp_path, shard_folder)
    job.wait_for_checkpoint()
    cluster.run("scancel", "--signal=USR1", job.id)  # as SLURM does before the time limit
    wait_for(lambda: cluster.restarts(job.id) == 1, 60, f"the job requeues itself: {job.text()}")
    wait_for(lambda: RESUMED in job.text(), 90, f"the job resumes: {job.text()}")
    saved = read_progress(job.run / LAST).step
    job.wait_for_checkpoint(saved + 1)
    cluster.run("scontrol", "requeue", job.id)
    wait_for(lambda: job.text().count(RESUMED) == 2, 120, f"the job resumes again: {job.text()}")
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert cluster.restarts(job.id) == 2
    assert json.loads((job.run / "summary.json").read_text())["steps"] == STEPS
    assert digest(job.run / LAST) == digest(undisturbed.run / LAST)


def test_a_cancelled_job_has_saved(cluster: Cluster, tmp_path: Path, shard_folder: Path):
    job = Job(cluster, tmp_path, shard_folder, "--checkpoints.every=1000000")
    wait_for(lambda: "training" in job.text(), 60, "the first step")
    time.sleep(3)
    cluster.run("scancel", job.id)
    assert job.wait_for_end() == "CANCELLED"
    wait_for((job.run / LAST).is_file, 30, f"a checkpoint: {job.text()}")
    assert verify_checksum(job.run / LAST) is None
    assert "Traceback" not in job.text()


def test_a_dead_node_ends_the_job_and_one_node_resumes_it(cluster: Cluster, tmp_path: Path, shard_folder: Path):
    job = Job(cluster, tmp_path, shard_folder, "--trainer.max_steps=100000")
    job.wait_for_checkpoint()
    killed = time.monotonic()
    cluster.kill_node("n2")
    running = ("RUNNING", "COMPLETING")
    wait_for(lambda: cluster.state(job.id) not in running, 60, f"the end of the job: {job.text()}")
    assert time.monotonic() - killed < 60
    assert job.text().count("another process of this run has ended") == 1
    assert "Traceback" not in job.text()
    assert verify_checksum(job.run / LAST) is None
    saved = read_progress(job.run / LAST).step
    assert saved >= 40
    if cluster.state(job.id) == "PENDING":
        cluster.run("scancel", job.id)
    more = [f"--run_name={job.id}", f"--trainer.max_steps={saved + 5}", "--trainer.num_nodes=1"]
    (tmp_path / "job.out").unlink()
    resumed = Job(cluster, tmp_path, shard_folder, *more, nodes=1)
    assert resumed.wait_for_end() == "COMPLETED", resumed.text()
    assert read_progress(job.run / LAST).step == saved + 5
