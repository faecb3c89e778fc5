"""The examples of docs/extending.md, as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TEXT
from trainer.quantize.container import read_container

DOCUMENT = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCUMENT, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL) for line in block.splitlines()]
SMALL = ["--eval.fit_tokens=512", "--eval.max_tokens=512"]
SMALL += ["--trainer.max_steps=12", "--trainer.val_check_interval=4", "--report.enabled=false"]
PYTHON_TEXT = ["--data.source.max_bytes=200000", "--data.source.vocab_size=512", "--model.vocab_size=512"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    words = TEXT.split()
    stanzas = ["\n".join(" ".join(words[k : k + 6] + words[n % 9 : n % 9 + 3]) for k in range(5)) for n in range(300)]
    (folder / "poems.txt").write_text("\n\n".join(f"{text} {number}" for number, text in enumerate(stanzas)))
    return folder


def run(command: str, place: Path, *more: str, sources: Path = ROOT) -> str:
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *words[1:], *more], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_examples_run(place: Path):
    stop, poems, store, validate, _ = COMMANDS
    said = run(stop, place, *SMALL, *PYTHON_TEXT, "--trainer.callbacks.bpb=100")
    assert "trained     4 steps" in said  # the first validation was good enough
    run(store, place)
    kinds = {name: tensor.kind for name, tensor in read_container(place / "eight/artifact.zst")[1].items()}
    before = {name: tensor.kind for name, tensor in read_container(place / "runs/quickstart/1/artifact.zst")[1].items()}
    changed = {name: kind for name, kind in kinds.items() if kind != before[name]}
    assert set(changed.values()) == {"int8"}
    assert all(name.startswith("blocks.0.") for name in changed)
    assert "val_bpb=" in run(validate, place)
    said = run(poems, place, *SMALL)
    assert "trained     12 steps" in said
    assert (place / "data/poems/manifest.json").is_file()


def test_the_option_of_the_model_is_a_patch_that_applies_trains_and_is_stored(place: Path, tmp_path: Path):
    clone = tmp_path / "clone"
    for part in ("trainer", "configs"):
        shutil.copytree(ROOT / part, clone / part)
    (patch,) = re.findall(r"```diff\n(.*?)```", DOCUMENT, re.DOTALL)
    subprocess.run(["git", "apply", "-"], cwd=clone, input=patch, text=True, check=True)
    said = run(COMMANDS[-1], place, *SMALL, *PYTHON_TEXT, "--run_name=power", sources=clone)
    assert "trained     12 steps" in said
    header, _ = read_container(place / "runs/quickstart/power/artifact.zst")
    assert header["model"]["mlp"]["power"] == 3
