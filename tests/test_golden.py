"""Files of every released version do what docs/artifact.md promises: all that their own version made of them."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers import trainer_here

GOLDEN = sorted(path for path in (ROOT / "tests/golden").iterdir() if (path / "expected.json").is_file())


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "golden"))


def run(cwd: Path, *args: str) -> str:
    result = trainer_here(*args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def expected(golden: Path, name: str):
    return pytest.approx(json.loads((golden / "expected.json").read_text())[name], abs=1e-4)


def test_there_are_golden_files_of_the_released_versions():
    released = [line.split()[1] for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert {path.name for path in GOLDEN} == set(released)


@pytest.mark.parametrize("name", ["nearest.zst", "loss_aware.zst", "step.ckpt"])
def test_files_of_older_versions_have_their_score_and_generate(golden: Path, name: str):
    last = run(golden, "validate", f"--ckpt={name}").splitlines()[-1]
    assert float(last.split()[0].partition("=")[2]) == expected(golden, name)
    if name.endswith(".zst"):
        text = run(golden, "generate", f"--artifact={name}", "--tokenizer=shards/tokenizer.model", "--tokens=5")
        assert text.strip()


def test_a_run_of_an_older_version_is_resumed_exported_and_continued_on_other_text(golden: Path):
    run(golden, "fit", "--config=golden.yaml", "--ckpt=step.ckpt", "--run_name=again")
    with (golden / "runs/golden/again/metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == expected(golden, "losses")
    run(golden, "export", "--ckpt=step.ckpt", "--data=shards", "--out=exported")
    assert (golden / "exported/artifact.zst").is_file()
    for parent in ("step.ckpt", "nearest.zst"):
        run(
            golden,
            "fit",
            "--config=golden.yaml",
            f"--init_from={parent}",
            f"--run_name={parent}",
            "--trainer.max_steps=1",
        )
