"""The warm-up compiles everything that a run needs and leaves no trace in its weights."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_OPTIONS

# The graphs are captured as for a GPU and then run by Python: no C++ compiler, and the same arithmetic bit by bit.
SCRIPT = """
import functools, hashlib, json, sys
import torch
torch.compile = functools.partial(torch.compile, backend="eager")
from torch._dynamo.utils import counters
from trainer.__main__ import main
from trainer.callbacks.late_swa import LateSWA
graphs = []
count = lambda: counters["stats"]["unique_graphs"]
LateSWA.on_train_start = lambda self, trainer, module: graphs.append(count())
old = LateSWA.on_train_batch_end
def spy(self, trainer, module, *rest):
    old(self, trainer, module, *rest)
    graphs.append(count())
    sha = hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.model.state_dict().values())).hexdigest()
    with open("seen.json", "w") as file:
        json.dump({"graphs": graphs, "weights": sha, "step": trainer.global_step}, file)
LateSWA.on_train_batch_end = spy
main(sys.argv[1:])
"""


@pytest.fixture
def run(tmp_path: Path, shard_folder: Path):
    (tmp_path / "compiled.py").write_text(SCRIPT)
    return partial(start, tmp_path, shard_folder)


def start(folder: Path, shards: Path, *words: str) -> dict:
    command = [sys.executable, "compiled.py", "fit", "--config=int5mlp_10l_parity", f"--data.source.folder={shards}"]
    result = subprocess.run(
        [*command, *TINY_OPTIONS, "--trainer.max_steps=5", "--trainer.val_check_interval=2", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "seen.json").read_text())


def test_compiling_and_warming_up_changes_no_weight_and_nothing_is_compiled_later(run):
    plain = run("--model.compile=off")
    assert set(plain["graphs"]) == {0}
    warm = run("--model.compile=on")
    assert warm["step"] == plain["step"] == 5
    assert warm["weights"] == plain["weights"]
    assert warm["graphs"][0] >= 2  # training and validation
    assert set(warm["graphs"]) == {warm["graphs"][0]}


def test_without_the_warmup_the_first_step_compiles(run):
    cold = run("--model.compile=on", "--warmup.steps=0")
    assert cold["graphs"][0] == 0
    assert cold["graphs"][1] > 0
