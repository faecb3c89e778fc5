"""The proof of a submission: a new process scores the artifact from its folder alone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from trainer.device import default_device
from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.source_bundle import sources_of
from trainer.versions import OPTIONAL, versions

SAME_TOLERANCE = 1e-6  # bits per byte, on the same hardware with the same libraries
OTHER_TOLERANCE = 1e-3
REQUIREMENTS = "requirements.txt"


def prove(folder: Path, data: Path, expected: dict[str, Any], fresh_env: bool = False) -> str:
    """Score a copy of the folder with its own code.

    Args:
        folder: The submission.
        data: Folder with the shards.
        expected: Summary of the run whose artifact ships.
        fresh_env: Install its requirements into a new environment and run it there.

    Returns:
        The result, in one line.

    Raises:
        UserError: If it does not run, or gives another score.
    """
    check_requirements(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as clean:
        copy = RunFolder(Path(clean) / "submission")
        shutil.copytree(folder, copy.path)
        args = ["validate", "--ckpt", copy.artifact.name, "--data.source", "Shards"]
        args += ["--data.source.folder", str(data.resolve()), "--data.source.tokenizer", copy.tokenizer.name]
        python = _new_environment(Path(clean) / "env", copy.path / REQUIREMENTS) if fresh_env else sys.executable
        command = [python, copy.code.name, *args]
        result = subprocess.run(command, cwd=copy.path, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(
            f"{folder}: its own code cannot score its artifact: {(result.stderr.strip() or '?').splitlines()[-1]}"
        )
    values = dict(pair.split("=") for pair in result.stdout.strip().splitlines()[-1].split())
    difference = float(values["val_bpb"]) - float(expected["val_bpb"])
    here = versions(default_device())
    is_same = json.loads((folder / "submission.json").read_text())["versions"] == here
    if (
        not abs(difference) <= (SAME_TOLERANCE if is_same else OTHER_TOLERANCE)  # also if it is not a number
        or int(values["tokens"]) != expected["val_tokens"]
    ):
        raise UserError(
            f"{folder}: scores {values['val_bpb']} on {values['tokens']} tokens of {data}, but the run scored "
            f"{expected['val_bpb']:.8f} on {expected['val_tokens']}; give the --data that the run was scored on"
        )
    is_same &= not fresh_env
    where = "the hardware and libraries of the run" if is_same else "other hardware or libraries than the run's"
    return f"val_bpb {values['val_bpb']} in a clean process on {where}: {difference:+.1e} from the run's"


def check_requirements(folder: Path) -> None:
    """Check that the requirements name a package for every import of the shipped code, without a network.

    Raises:
        UserError: If one is missing, or the code does not compile.
    """
    code = RunFolder(folder).code
    try:
        compile(code.read_bytes(), code.name, "exec")
        sources = sources_of(code.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(
            f"{code}: is not a script of this trainer that compiles ({error}); export the run again"
        ) from error
    required = {
        re.split(r"[=\[]", line)[0].lower().replace("-", "_")
        for line in (folder / REQUIREMENTS).read_text().splitlines()
    }
    distributions = packages_distributions()
    for name in sorted(_imports(sources) - set(sys.stdlib_module_names) - {"trainer", *OPTIONAL}):
        packages = {each.lower().replace("-", "_") for each in distributions.get(name, [name])}
        if not packages & required:
            raise UserError(f"{folder / REQUIREMENTS}: lacks {name}, which the code imports")


def _imports(sources: dict[str, bytes]) -> set[str]:
    """Top-level names of all modules that Python sources import."""
    names: set[str] = set()
    for name, text in sources.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.partition(".")[0])
    return names


def _new_environment(path: Path, requirements: Path) -> str:
    """Make a virtual environment with the requirements; returns its Python."""
    python = path / "bin/python"
    for command in (
        [sys.executable, "-m", "venv", str(path)],
        [str(python), "-m", "pip", "install", "-q", "-r", str(requirements)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise UserError(f"--fresh_env: {(result.stderr.strip() or '?').splitlines()[-1]}")
    return str(python)
