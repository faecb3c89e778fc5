"""The proof of a submission: a new process scores the artifact from its folder alone."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.versions import versions

SAME_TOLERANCE = 1e-6  # bits per byte, on the same hardware with the same libraries
OTHER_TOLERANCE = 1e-3


def prove(folder: Path, data: Path, expected: dict[str, Any]) -> str:
    """Score a copy of the folder with its own code.

    Args:
        folder: The submission.
        data: Folder with shards and tokenizer.
        expected: Summary of the run whose artifact ships.

    Returns:
        The result, in one line.

    Raises:
        UserError: If it does not run, or gives another score.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as clean:
        copy = RunFolder(Path(clean) / "submission")
        shutil.copytree(folder, copy.path)
        args = ["validate", "--ckpt", copy.artifact.name, "--data.source", "Shards"]
        args += ["--data.source.folder", str(data.resolve())]
        command = [sys.executable, copy.code.name, *args]
        result = subprocess.run(command, cwd=copy.path, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(
            f"{folder}: its own code cannot score its artifact: {(result.stderr.strip() or '?').splitlines()[-1]}"
        )
    values = dict(pair.split("=") for pair in result.stdout.strip().splitlines()[-1].split())
    difference = float(values["val_bpb"]) - float(expected["val_bpb"])
    here = versions(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    is_same = json.loads((folder / "submission.json").read_text())["versions"] == here
    if (
        abs(difference) > (SAME_TOLERANCE if is_same else OTHER_TOLERANCE)
        or int(values["tokens"]) != expected["val_tokens"]
    ):
        raise UserError(
            f"{folder}: scores {values['val_bpb']} on {values['tokens']} tokens of {data}, but the run scored "
            f"{expected['val_bpb']:.8f} on {expected['val_tokens']}; give the --data that the run was scored on"
        )
    where = "the hardware and libraries of the run" if is_same else "other hardware or libraries than the run's"
    return f"val_bpb {values['val_bpb']} in a clean process on {where}: {difference:+.1e} from the run's"
