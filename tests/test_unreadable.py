"""A file that may not be read is said to be that: not missing, not damaged, not somebody else's."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.__main__ import main

GOLDEN = ROOT / "tests/golden/0.1.0"


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets no file of this path be opened; root, which tests may run as, could open it whatever its mode."""
    original = io.open

    def close(path: Path) -> None:
        def opened(file: Any, *args: Any, **options: Any) -> Any:
            if isinstance(file, str | Path) and Path(file).resolve() == path.resolve():
                raise PermissionError(13, "Permission denied", str(file))
            return original(file, *args, **options)

        monkeypatch.setattr(io, "open", opened)

    return close


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a run that has files of every kind."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs/golden/1"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "nearest.zst", run / "artifact.zst")
    shutil.copy(tmp_path / "step.ckpt", run / "checkpoints/last.ckpt")
    shutil.copy(tmp_path / "step.ckpt", run / "checkpoints/step-000000004.ckpt")
    shutil.copy(tmp_path / "shards/tokenizer.model", run)
    shutil.copy(tmp_path / "golden.yaml", run / "config.yaml")
    (run / "summary.json").write_text("{}")
    (tmp_path / "shards/manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = "runs/golden/1"


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (f"{RUN}/artifact.zst", f"validate --ckpt {RUN}/artifact.zst"),
        (f"{RUN}/artifact.zst", f"inspect {RUN}/artifact.zst"),
        (f"{RUN}/tokenizer.model", f"generate --artifact {RUN}/artifact.zst --prompt a"),
        (f"{RUN}/checkpoints/last.ckpt", "fit --config golden.yaml --ckpt last --run_name 1"),
        (f"{RUN}/checkpoints/last.ckpt", f"export --ckpt {RUN}/checkpoints/last.ckpt"),
        (f"{RUN}/summary.json", f"report {RUN}"),
        (f"{RUN}/config.yaml", f"compare {RUN} {RUN}"),
        (f"{RUN}/summary.json", "runs prune --keep 1 --dry_run"),
        ("shards/manifest.json", "inspect shards"),
        ("shards/manifest.json", "prepare --verify --data.source LocalText --data.source.folder shards"),
        ("shards/manifest.json", "prepare --data.source LocalText --data.source.folder shards"),
        ("shards/tokenizer.model", "fit --config golden.yaml"),
    ],
)
def test_the_file_and_the_reason_are_named(file: str, command: str, folder: Path, close, capsys):
    if "LocalText" in command:
        (folder / "a.txt").write_text("some text")
        command += " --data.source.train_files a.txt"
    close(folder / file)
    assert main(command.split()) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "Permission" in line)
    assert file in line
    assert line.endswith("Permission denied); check its permissions") or line.endswith(
        "Permission denied; check its permissions"
    )
    assert "damaged" not in line


def test_a_list_of_runs_goes_on_without_the_one_that_may_not_be_read(folder: Path, close, capsys):
    shutil.copytree(folder / RUN, folder / "runs/golden/2")
    close(folder / RUN / "summary.json")
    assert main(["runs"]) == 0
    shown = capsys.readouterr()
    assert f"{RUN}/summary.json: cannot be read" in shown.out + shown.err
    assert "| runs/golden/2 |" in shown.out
    assert f"| {RUN} |" not in shown.out
