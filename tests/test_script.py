"""Which runs count as made with a user's own code, and when that code is another one."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

HELPER = "RATE = 0.1\n\n\ndef activation(self, x, scale):\n    return self.down(self.up(x) * RATE, scale)\n"
# Each change is undone before the next one. Those of a line are different code, in a loop or by their values.
PROGRAM = """
import functools
import json
from types import SimpleNamespace

import trainer.clock
from trainer.clock import TrainingClock
from trainer.script import script_record

import helper

records = {}


def record(name, change, *objects):
    start, now = TrainingClock.start, trainer.clock.time
    if change is not None:
        TrainingClock.start = change
    records[name] = script_record(b"", objects)
    TrainingClock.start, trainer.clock.time = start, now


def scaled(by, **more):
    def start(self):
        return by

    return start


@functools.wraps(TrainingClock.start)
def wrapped(self):
    return 1


def late(kind):
    change = lambda self: later()
    record(kind, change)

    def later():
        return 1


class Watch:
    def __init__(self, number):
        self.number = number

    def __call__(self):
        return self.number


class Factory:
    @staticmethod
    def make(by):
        class Made(Watch):
            def start(self):
                return by

        return Made


record("nothing", None)
record("library", functools.wraps)
record("foreign object", None, SimpleNamespace())
for number in (1, 2):
    record(f"closure {number}", scaled(number))
    record(f"list {number}", scaled([number]))
    record(f"default {number}", lambda self, number=number: number)
    record(f"set {number}", [lambda self: self in {"a", "b", "c"}, lambda self: self in {"b", "a"}][number - 1])
    record(f"partial {number}", functools.partial(scaled, number))
    record(f"cached {number}", functools.lru_cache(scaled(number)))
    record(f"method {number}", staticmethod(scaled(number)))
    record(f"object {number}", Watch(number))
    record(f"class {number}", Factory.make(number))
    record(f"callback {number}", None, Factory.make(number)(0))
record("wraps", wrapped)
record("helper", helper.activation)
late("late")
print(json.dumps(records))
"""
SCRIPT = """
import json
import sys

import helper
from trainer.script import script_record, user_script

if len(sys.argv) > 1:
    print(json.dumps([script_record(b""), user_script("fit")]))
"""


def run(folder: Path, *args: str) -> Any:
    """What a program of the user's prints last."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith(("{", "["))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    return tmp_path


@pytest.mark.parametrize("start", [["program.py"], ["-c", PROGRAM]])
def test_a_program_that_calls_the_api_is_named_only_where_it_changes_the_trainer(start: list[str], folder: Path):
    (folder / "program.py").write_text(PROGRAM)
    records = run(folder, *start)
    unchanged = ("nothing", "library", "foreign object")
    assert [records.pop(name) for name in unchanged] == [None] * 3
    assert all(records.values())
    assert {each["name"] for each in records.values()} <= {"program.py", "notebook", "helper"}
    assert len({each["sha256"] for each in records.values()}) == len(records)
    again = run(folder, *start)
    assert [again.pop(name) for name in unchanged] == [None] * 3
    assert again == records  # in another process, with other hashes of texts
    (folder / "helper.py").write_text(HELPER.replace("0.1", "0.2"))
    other = run(folder, *start)
    assert not {each["sha256"] for each in other.values() if each} & {each["sha256"] for each in records.values()}


@pytest.mark.parametrize(
    ("start", "name", "command"),
    [
        (["mine.py"], "mine.py", ["mine.py"]),
        (["-m", "mine"], "mine.py", ["-m", "mine"]),
        (["-m", "app"], "__main__.py", ["-m", "app"]),
        (["app"], "__main__.py", ["app"]),
        (["app.zip"], "app.zip", ["app.zip"]),
        (["noend"], "noend", ["noend"]),
        (["-m", "cProfile", "-o", "profile", "mine.py"], "mine.py", ["mine.py"]),
        (["-m", "pdb", "-c", "c", "-c", "q", "mine.py"], "mine.py", ["mine.py"]),
    ],
)
def test_a_script_that_runs_a_command_is_named_with_all_that_it_imports(
    start: list[str], name: str, command: list[str], folder: Path
):
    (folder / "app").mkdir()
    for file in ("mine.py", "noend", "app/__main__.py"):
        (folder / file).write_text(SCRIPT)
    (folder / "app/helper.py").write_text(HELPER)
    with zipfile.ZipFile(folder / "app.zip", "w") as archive:
        archive.writestr("__main__.py", SCRIPT)
        archive.writestr("helper.py", HELPER)
    record, restart = run(folder, *start, "fit")
    assert record["name"] == name
    assert restart[:-1] == command[:-1]
    assert restart[-1] in (command[-1], str(folder / command[-1]))
    assert run(folder, *restart, "fit")[0] == record
    assert run(folder, *start, "show") == [None, None]  # its own command
    (folder / "helper.py").write_text(HELPER.replace("0.1", "0.2"))
    (folder / "app/helper.py").write_text(HELPER.replace("0.1", "0.2"))
    if "app.zip" not in start:
        assert run(folder, *start, "fit")[0]["sha256"] != record["sha256"]


def test_an_installed_package_and_the_trainer_itself_are_not_the_users(folder: Path):
    installed = folder / "installed"
    information = installed / "other-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    (information / "top_level.txt").write_text("other\n")
    patch = "from trainer.clock import TrainingClock\n\n\nclass Other(TrainingClock):\n    pass\n\n\n"
    patch += "import trainer.clock\ntrainer.clock.TrainingClock = Other\n"
    (installed / "other.py").write_text(patch)
    (installed / "mine.py").write_text(patch)  # somebody's own, beside what is installed
    ask = "import json, sys; sys.path.append('installed'); import {}; from trainer.script import script_record\n"
    ask += "print(json.dumps([script_record(b'')]))"
    assert run(folder, "-c", ask.format("other")) == [None]
    assert run(folder, "-c", ask.format("mine"))[0]["name"] == "mine"
    starter = folder / "bin/trainer"  # wherever pip has put it
    starter.parent.mkdir()
    starter.write_text("import sys\nfrom trainer.__main__ import program\n" + SCRIPT.replace("import helper\n", ""))
    assert run(folder, str(starter), "fit") == [None, None]
