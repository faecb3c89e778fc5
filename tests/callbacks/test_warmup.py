"""The warm-up compiles everything that a run needs and does not change its weights."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY_OPTIONS
from tests.helpers import python

# The graphs are captured as for a GPU and then run by Python: no C++ compiler, and the same arithmetic bit by bit.
SCRIPT = """
import functools, hashlib, json, os, sys
import torch
torch.compile = functools.partial(torch.compile, backend="eager")
from torch._dynamo.utils import counters
from trainer.__main__ import main
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.lightning_module import LanguageModel
rank = int(os.environ.get("LOCAL_RANK", 0))
original_nll_of = LanguageModel.nll_of
def nll_of(self, model):
    nll = original_nll_of(self, model)
    def limited(ids, targets, start_pos, excluded=None):
        is_limited = rank == int(os.environ["LIMITED_RANK"]) and torch.is_grad_enabled()
        if is_limited and len(ids) > int(os.environ["SEQUENCES_THAT_FIT"]):
            raise torch.cuda.OutOfMemoryError("planted")
        return nll(ids, targets, start_pos)
    return limited
LanguageModel.nll_of = nll_of
from trainer.callbacks import warmup
released = []
warmup.release_memory = released.append
graphs = []
count = lambda: counters["stats"]["unique_graphs"]
WeightAveraging.on_train_start = lambda self, trainer, module: graphs.append(count())
original_end = WeightAveraging.on_train_batch_end
def spy(self, trainer, module, *args):
    original_end(self, trainer, module, *args)
    graphs.append(count())
    sha = hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.model.state_dict().values())).hexdigest()
    with open(f"seen{rank}.json", "w") as file:
        json.dump({"graphs": graphs, "weights": sha, "step": trainer.global_step, "released": len(released)}, file)
WeightAveraging.on_train_batch_end = spy
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(tmp_path: Path, shard_folder: Path):
    (tmp_path / "compiled.py").write_text(SCRIPT)
    return partial(start, tmp_path, shard_folder)


def start(folder: Path, shards: Path, *args: str, fit: int = 1000, rank: int = 0) -> subprocess.CompletedProcess[str]:
    command = ["compiled.py", "fit", "--config=int5mlp_10l_parity", f"--data.source.folder={shards}", *TINY_OPTIONS]
    steps = ["--trainer.max_steps=5", "--trainer.val_check_interval=2", "--model.num_layers=2"]
    steps += ["--export.enabled=false"]
    return python(*command, *steps, *args, cwd=folder, SEQUENCES_THAT_FIT=str(fit), LIMITED_RANK=str(rank))


def seen(result: subprocess.CompletedProcess[str], folder: Path, rank: int = 0) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads((folder / f"seen{rank}.json").read_text())


def test_compiling_and_warming_up_changes_no_weight_and_nothing_is_compiled_later(run, tmp_path: Path):
    loop = ["--model.loop.first=0", "--model.loop.last=1", "--model.loop.repeats=1", "--model.loop.start_frac=0.5"]
    plain = seen(run("--model.compile=off", *loop), tmp_path)
    assert set(plain["graphs"]) == {0}
    warm = seen(run("--model.compile=on", *loop), tmp_path)
    assert warm["step"] == plain["step"] == 5
    assert warm["weights"] == plain["weights"]
    assert warm["graphs"][0] >= 4  # training and validation, before the loop and with it
    assert set(warm["graphs"]) == {warm["graphs"][0]}


def test_without_the_warmup_the_first_step_compiles(run, tmp_path: Path):
    cold = seen(run("--model.compile=on", "--warmup.steps=null"), tmp_path)
    assert cold["graphs"][0] == 0
    assert cold["graphs"][1] > 0


def test_the_largest_equal_micro_batch_that_fits_is_used_and_written_to_the_config(run, tmp_path: Path):
    """A step has 8 sequences and the simulated memory holds 3: micro-batches of 2 are the largest equal ones."""
    result = run("--model.compile=on", fit=3)
    searched = seen(result, tmp_path)
    assert "4 micro-batches of 64 tokens" in result.stdout
    config = yaml.safe_load((tmp_path / "runs/int5mlp_10l_parity/1/config.yaml").read_text())
    assert config["model"]["micro_batch_tokens"] == 64
    assert set(searched["graphs"]) == {searched["graphs"][0]}
    given = seen(run("--model.compile=off", "--model.micro_batch_tokens=64"), tmp_path)
    assert given["weights"] == searched["weights"]


def test_a_sequence_that_does_not_fit_is_reported_in_one_line(run):
    result = run("--model.compile=on", fit=0)
    assert result.returncode == 1
    assert "not even one sequence of 32 tokens fits" in result.stderr
    assert "Traceback" not in result.stderr


def test_processes_agree_on_a_micro_batch_where_only_one_has_little_memory(run, tmp_path: Path):
    """Each has 4 sequences of a step; the memory of rank 1 holds one of them, that of rank 0 all."""
    result = run("--model.compile=on", "--trainer.devices=2", "--trainer.accelerator=cpu", fit=1, rank=1)
    one, two = (seen(result, tmp_path, rank) for rank in range(2))
    assert (one["released"], two["released"]) == (2, 2)  # both forget the attempts of 4 and of 2 sequences
    assert "4 micro-batches of 32 tokens" in result.stdout
    assert one["weights"] == two["weights"]
