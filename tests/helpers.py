"""What several test modules share: running the trainer as a user does, a small recipe, and reading its results."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import torch

from tests.conftest import ROOT, TINY_OPTIONS
from tests.forkserver import ForkServer
from trainer.__main__ import main
from trainer.checkpoint import load_checkpoint
from trainer.cli.env_aliases import PLAIN, SPECIAL

RECIPE = "int5mlp_10l_parity"
RUNS = Path("runs") / RECIPE


def environment(**more: str) -> dict[str, str]:
    """This process's environment with this checkout's packages, one thread per process and no aliases of options."""
    kept = {key: value for key, value in os.environ.items() if key not in (*PLAIN, *SPECIAL)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


@cache
def fork_server() -> ForkServer:
    """The server of this test worker."""
    return ForkServer(environment())


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a module or a script in a process of its own that does not import the libraries anew."""
    with tempfile.TemporaryDirectory() as folder:
        return fork_server().run(list(args), cwd, environment(**env), Path(folder))


def trainer(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m trainer`."""
    return python("trainer", *args, cwd=cwd, **env)


def trainer_here(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what ends before it trains: importing everything would take most of the time."""
    before, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    variables = dict(os.environ)
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(list(args))
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def faulty_command(fault: str, parameters: dict[str, object], *args: str) -> list[str]:
    """Module and arguments that run the trainer with a fault of `tests.faults` planted into it."""
    return ["tests.faults", fault, json.dumps(parameters), *args]


def start_faulty(fault: str, parameters: dict[str, object], *args: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the trainer with a planted fault."""
    command = [sys.executable, "-m", *faulty_command(fault, parameters, *args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(), **pipes)


def run_faulty(
    fault: str, parameters: dict[str, object], *args: str, cwd: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the trainer with a planted fault to its end, by way of a launcher such as torchrun if one is given."""
    return python(*launcher, *faulty_command(fault, parameters, *args), cwd=cwd)


def small(shards: Path, *more: str) -> list[str]:
    """Arguments of a run of eight steps of a small model, without a report."""
    return [
        "fit",
        f"--config={RECIPE}",
        f"--data.source.folder={shards}",
        *TINY_OPTIONS,
        "--trainer.val_check_interval=4",
        "--model.schedule.warmdown_steps=6",
        "--trainer.max_steps=8",
        "--averaging.every=2",
        "--averaging.start_frac=0.6",
        "--trainer.log_every_n_steps=1",
        *more,
    ]


def score_of(output: str) -> dict[str, float]:
    """The numbers of the last line of a run or a validation."""
    return {key: float(value) for key, value in (pair.split("=") for pair in output.strip().splitlines()[-1].split())}


def digest(checkpoint: Path) -> str:
    """sha256 of weights, optimizer state and average."""
    content = load_checkpoint(checkpoint)
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    add([content["state_dict"], content["optimizer_states"], content["callbacks"]["WeightAveraging"]])
    return sha.hexdigest()
