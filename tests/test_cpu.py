"""How OpenMP's threads wait, as OpenMP itself reports it, and what is said of a busy machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers import environment
from trainer import api, cpu
from trainer.callbacks import progress


@pytest.mark.parametrize(
    ("program", "variables", "expected"),
    [
        ("from trainer.__main__ import main; main(['inspect', 'nowhere']); import torch", {}, "'1000'"),
        ("import trainer; trainer.load_artifact", {}, "'1000'"),
        ("import trainer; trainer.load_artifact", {"GOMP_SPINCOUNT": "70"}, "'70'"),
        ("import trainer; trainer.load_artifact", {"OMP_WAIT_POLICY": "passive"}, "'0'"),
        ("import torch, trainer; trainer.load_artifact", {}, "'300000'"),  # too late
    ],
)
def test_idle_threads_sleep_soon_unless_the_user_has_decided(program: str, variables: dict[str, str], expected: str):
    env = {name: value for name, value in environment().items() if name not in cpu.USERS_OWN}
    env |= {"OMP_NUM_THREADS": "2", "OMP_DISPLAY_ENV": "VERBOSE"} | variables
    result = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in result.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("torch uses another OpenMP here")
    assert expected in lines[0]


@pytest.mark.parametrize(("load", "is_said"), [(2.5, False), (4.3, True)])
def test_a_busy_machine_is_mentioned_once(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch, load: float, is_said: bool, tiny_overrides
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(progress, "LOAD_SECONDS", 0.0)
    run = api.fit("int5mlp_10l_parity", {**tiny_overrides, "export.enabled": False, "report.enabled": False})
    said = [line for line in (run.run_folder / "train.log").read_text().splitlines() if "other processes" in line]
    assert said == (["4.3 threads share 3 cores: other processes slow the training down"] if is_said else [])
