"""Which runs count as made with a user's own code, and when that code is another one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.helpers import python

HELPER = "RATE = 0.1\n\n\ndef activation(self, x, scale):\n    return self.down(self.up(x) * RATE, scale)\n"
PROGRAM = """
import json
import sys
from functools import partial

import lightning.pytorch as pl
import torch
from trainer.model.mlp import MLP
from trainer.quantize import policy
from trainer.script import script_record

records = []
record = lambda *objects: records.append(script_record(b"", objects))
record(pl.Callback())
forward, storage = MLP.forward, policy.storage_dtype
import helper


def scaled(by):
    def forward(self, x, scale):
        return self.down(self.up(x) * by, scale)

    return forward


class Watch(pl.Callback):
    pass


for change in (scaled(0.5), scaled(0.25), lambda self, x, scale: x, helper.activation, forward):
    MLP.forward = change
    record()
policy.storage_dtype = partial(lambda *a: "int8")
record()
policy.storage_dtype = torch.relu  # of a library
record()
policy.storage_dtype = storage
record(Watch())
print(json.dumps(records))
"""


def records(folder: Path, *args: str) -> list[Any]:
    """What a program of the user's prints."""
    result = python(*args, cwd=folder)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def test_a_program_that_calls_the_api_is_named_only_where_it_changes_the_trainer(folder: Path):
    first, *patched, whole, partial, library, callback = records(folder, "program.py")
    assert (first, whole, library) == (None, None, None)
    changed = [*patched, partial, callback]
    assert [each["name"] for each in changed if each] == ["program.py"] * 6
    assert len({each["sha256"] for each in changed if each}) == 6  # also those of one function with two numbers
    assert records(folder, "program.py") == [first, *patched, whole, partial, library, callback]
    (folder / "helper.py").write_text(HELPER.replace("0.1", "0.2"))
    again = records(folder, "program.py")
    assert [each is None for each in again] == [
        each is None for each in (first, *patched, whole, partial, library, callback)
    ]
    assert not {each["sha256"] for each in again if each} & {each["sha256"] for each in changed if each}


def test_a_script_that_runs_a_command_is_named_with_all_that_it_imports(folder: Path):
    script = "import json\n\nimport helper\nfrom trainer.script import script_record, user_script\n\n"
    script += "print(json.dumps([script_record(b''), user_script('fit')]))\n"
    (folder / "mine.py").write_text(script)
    (folder / "package").mkdir()
    (folder / "package/__main__.py").write_text(script)
    programs = {
        "mine.py": ("mine.py", ["mine.py"]),
        "mine": ("mine.py", ["-m", "mine"]),
        "package": ("__main__.py", ["-m", "package"]),
    }
    before = {program: records(folder, program, "fit") for program in programs}
    for program, (name, command) in programs.items():
        record, started = before[program]
        assert (record["name"], started) == (name, command)
    assert records(folder, "mine.py", "show") == [None, None]  # its own command
    (folder / "helper.py").write_text(HELPER.replace("0.1", "0.2"))
    after = {program: records(folder, program, "fit") for program in programs}
    assert all(before[program][0]["sha256"] != after[program][0]["sha256"] for program in programs)


def test_an_installed_package_and_the_trainer_itself_are_not_the_users(folder: Path):
    installed = folder / "installed"
    (installed / "other-1.0.dist-info").mkdir(parents=True)
    (installed / "other.py").write_text(
        "import json\n\nfrom trainer.model.mlp import MLP\nfrom trainer.script import script_record\n\n\n"
        "class Wider(MLP):\n    pass\n\n\nimport trainer.model.transformer\ntrainer.model.transformer.MLP = Wider\n"
        "print(json.dumps(script_record(b'')))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    command = [sys.executable, "-c", "import other"]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) is None
